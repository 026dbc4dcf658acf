"""What an exported file is fed, and how far its answers are from those of its model."""

import copy
import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from shrp_hf.defaults import MAX_LENGTH
from shrp_hf.export.options import Text
from shrp_hf.models.lengths import num_positions
from shrp_hf.models.outputs import (
    EMBEDDING,
    MULTI_LABEL,
    REGRESSION,
    predicts_per_token,
    problem_type,
    task_head,
    with_vectors,
)

Arrays = dict[str, np.ndarray]

BATCH_SIZE = 16
NUM_RANDOM = 24


def is_multiple_choice(model: PreTrainedModel) -> bool:
    """Whether inputs have shape (batch, choices, length)."""
    return task_head(model) == "MultipleChoice"


def input_names(model: PreTrainedModel, tokenizer: Any = None) -> list[str]:
    """What the file asks for: what the tokenizer gives and the model takes."""
    if model.main_input_name == "pixel_values":
        return ["pixel_values"]
    given = ["input_ids", "token_type_ids", "attention_mask"]
    if tokenizer is not None:
        given = [name for name in tokenizer.model_input_names if name in given]
    elif getattr(model.config, "type_vocab_size", 0) < 2:
        given.remove("token_type_ids")
    if "attention_mask" not in given:
        given.append("attention_mask")  # padded batches mean nothing without it
    takes = inspect.signature(model.forward).parameters
    return sorted((name for name in given if name in takes), key=("input_ids", "attention_mask", "token_type_ids").index)


def make_batches(model: PreTrainedModel, tokenizer: Any, texts: Sequence[Text]) -> list[Arrays]:
    """Makes batches as a server would: padded ones, and single sentences, the shortest and the longest among them.

    Without a tokenizer token ids are drawn at random; an image model gets random pixels.
    """
    names = input_names(model, tokenizer)
    if names == ["pixel_values"]:
        return _random_images(model)
    longest = min(num_positions(model) or MAX_LENGTH, MAX_LENGTH)
    if tokenizer is None:
        rows = _random_rows(model, longest)
    else:
        firsts, seconds = zip(*((t, None) if isinstance(t, str) else t for t in texts), strict=True)
        pairs = None if seconds[0] is None else list(seconds)
        encoded = tokenizer(list(firsts), pairs, truncation=True, max_length=min(longest, tokenizer.model_max_length))
        rows = [{name: encoded[name][i] for name in encoded if name in names} for i in range(len(texts))]
    by_length = sorted(rows, key=lambda row: len(row["input_ids"]))
    groups = [rows[i : i + BATCH_SIZE] for i in range(0, len(rows), BATCH_SIZE)] + [by_length[:1], by_length[-1:]]
    return [_pad(model, names, group) for group in groups]


def _random_images(model: PreTrainedModel) -> list[Arrays]:
    size = model.config.image_size
    size = (size, size) if isinstance(size, int) else tuple(size)
    generator = np.random.default_rng(0)
    shapes = [(count, model.config.num_channels, *size) for count in (NUM_RANDOM, 1)]
    return [{"pixel_values": generator.standard_normal(shape, dtype=np.float32)} for shape in shapes]


def _random_rows(model: PreTrainedModel, longest: int) -> list[dict[str, list[int]]]:
    generator, padding = np.random.default_rng(0), model.config.pad_token_id
    allowed = [token for token in range(model.config.vocab_size) if token != padding]
    lengths = generator.integers(1, longest + 1, size=NUM_RANDOM)
    return [{"input_ids": generator.choice(allowed, size=length).tolist()} for length in lengths]


def _pad(model: PreTrainedModel, names: Sequence[str], rows: Sequence[Mapping[str, list[int]]]) -> Arrays:
    if is_multiple_choice(model) and len(rows) % 2:
        rows = [*rows, rows[0]]
    length = max(len(row["input_ids"]) for row in rows)
    batch: Arrays = {name: np.zeros((len(rows), length), dtype=np.int64) for name in names}
    batch["input_ids"][:] = model.config.pad_token_id or 0
    for i, row in enumerate(rows):
        real = len(row["input_ids"])
        batch["attention_mask"][i, :real] = 1
        for name in set(names) & set(row):
            batch[name][i, :real] = row[name]
    if is_multiple_choice(model):
        return {name: array.reshape(-1, 2, length) for name, array in batch.items()}
    return batch


def torch_outputs(model: PreTrainedModel, names: Sequence[str], batches: Sequence[Arrays]) -> list[Arrays]:
    """What PyTorch says of each batch, in float64 on the CPU, where no kernel's rounding counts."""
    double = copy.deepcopy(model).to("cpu", torch.float64).eval()
    found = []
    for batch in batches:
        inputs = {name: torch.from_numpy(array) for name, array in batch.items()}
        inputs = {name: values.double() if values.is_floating_point() else values for name, values in inputs.items()}
        with torch.inference_mode():
            output = with_vectors(double, double(**inputs, return_dict=True), inputs.get("attention_mask"))
        found.append({name: output[name].numpy() for name in names})
    return found


def onnx_outputs(session: Any, names: Sequence[str], batch: Arrays) -> Arrays:
    """What ONNX Runtime says."""
    return dict(zip(names, session.run(list(names), batch), strict=True))


def of_real_tokens(model: PreTrainedModel, batches: Sequence[Arrays], outputs: Sequence[Arrays]) -> list[Arrays]:
    """Leaves the padding out of outputs with an entry for each token.

    Nobody reads what stands there, and where a window holds no real token it is what the runtime makes of nothing.
    """
    names = {"last_hidden_state", "start_logits", "end_logits"} | ({"logits"} if predicts_per_token(model) else set())
    pairs = zip(batches, outputs, strict=True)
    return [{name: _real(b, values) if name in names else values for name, values in each.items()} for b, each in pairs]


def first_texts(outputs: Sequence[Arrays], count: int) -> np.ndarray:
    """Logits of the first `count` texts that batches were made of, in their order, (count, labels)."""
    return np.concatenate([batch["logits"] for batch in outputs])[:count]


def difference(expected: Sequence[Arrays], found: Sequence[Arrays]) -> float:
    """Largest distance of any output, relative to the largest output of its name, which counts as at least 1.

    NaN where either has one.
    """
    worst = 0.0
    for name in expected[0]:
        scale = max(1.0, *(float(np.abs(e[name]).max()) for e in expected))
        distances = [float(np.abs(e[name] - f[name]).max()) / scale for e, f in zip(expected, found, strict=True)]
        worst = float(np.max([worst, *distances]))  # unlike the built-in, this keeps a NaN
    return worst


def agreement(
    model: PreTrainedModel, batches: Sequence[Arrays], expected: Sequence[Arrays], found: Sequence[Arrays]
) -> tuple[str, float]:
    """How far predictions agree, 1 for all: what was compared, and the share.

    Classes and spans: the share of equal predictions, over sequences or real tokens. Regression: 1 - sum of squared
    differences / sum of squared deviations from the mean (of each output), NaN where all predictions are one. A base model:
    the mean cosine of its real tokens' vectors, of an embedding model that of its sentences'.
    """
    pairs = list(zip(batches, expected, found, strict=True))
    if EMBEDDING in expected[0]:
        return "mean cosine of sentence vectors", _mean([_cosine(e[EMBEDDING], f[EMBEDDING]) for _, e, f in pairs])
    if "last_hidden_state" in expected[0]:
        sides = [(_real(b, e["last_hidden_state"]), _real(b, f["last_hidden_state"])) for b, e, f in pairs]
        return "mean cosine of token vectors", _mean([_cosine(e, f) for e, f in sides])
    if "start_logits" in expected[0]:
        both = [np.equal(*(_span(x, b) for x in (e, f))).all(axis=-1) for b, e, f in pairs]
        return "equal spans", _mean(both)
    per_token, kind = predicts_per_token(model), problem_type(model)
    e, f = (
        np.concatenate([_real(b, x["logits"]) if per_token else x["logits"] for b, x in zip(batches, side, strict=True)])
        for side in (expected, found)
    )
    if kind == MULTI_LABEL:
        return "equal labels", _mean([(e > 0) == (f > 0)])
    if kind == REGRESSION:
        spread = float(np.square(e - e.mean(axis=0)).sum())
        return "1 - error / variance", 1 - float(np.square(e - f).sum()) / spread if spread else math.nan
    return "equal classes", _mean([e.argmax(axis=-1) == f.argmax(axis=-1)])


def _mean(parts: Sequence[np.ndarray]) -> float:
    return float(np.concatenate([np.ravel(part) for part in parts]).mean())


def _real(batch: Arrays, values: np.ndarray) -> np.ndarray:
    """One row a token, (batch, length, ...) without the padding; images have none."""
    mask = batch.get("attention_mask")
    return values if mask is None else values[mask == 1]


def _span(outputs: Arrays, batch: Arrays) -> np.ndarray:
    """Positions of the best start and end among the real tokens, (batch, 2)."""
    scores = [np.where(batch["attention_mask"] == 1, outputs[k], -np.inf) for k in ("start_logits", "end_logits")]
    return np.stack([score.argmax(axis=-1) for score in scores], axis=-1)


def _cosine(expected: np.ndarray, found: np.ndarray) -> np.ndarray:
    e, f = (x.astype(np.float64).reshape(-1, x.shape[-1]) for x in (expected, found))
    return (e * f).sum(axis=-1) / np.maximum(np.linalg.norm(e, axis=-1) * np.linalg.norm(f, axis=-1), 1e-12)
