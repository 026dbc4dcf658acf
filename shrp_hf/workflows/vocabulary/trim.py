"""`trim_vocabulary`: keep, cut, verify, write."""

import copy
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel

from shrp_hf.defaults import VOCABULARY_FLOOR
from shrp_hf.export.check import Arrays, difference, make_batches, torch_outputs
from shrp_hf.export.onnx import output_names
from shrp_hf.files import remove_staged, writing_to
from shrp_hf.workflows.vocabulary.tokens import Vocabulary, encode, unlimited

SAME = 1e-10  # of the largest output, in float64
MOST_COMPARED = 64  # texts on which outputs are compared; how all of them are read is compared in any case
HELD_OUT = 10  # one line in so many
_SENTENCE_FILES = ("sentence_bert_config.json", "config_sentence_transformers.json", "modules.json")


@dataclass(frozen=True)
class TrimOptions:
    """What stays beside the tokens that the corpus uses.

    Args:
        floor: Least number of tokens: the commonest join until there are as many.
        alphabet: Whether every single character and byte stays, so that any word can still be spelled.

    Raises:
        ValueError: `floor` is below 0.
    """

    floor: int = VOCABULARY_FLOOR
    alphabet: bool = True

    def __post_init__(self) -> None:
        if self.floor < 0:
            raise ValueError(f"`floor` must be at least 0 tokens, got {self.floor}.")


@dataclass(frozen=True)
class TrimResult:
    """What was cut, and how the rest reads text that it was not made from.

    Args:
        tokens: Tokens before and after.
        parameters: Parameters of the whole model before and after.
        compared_texts: Texts of the corpus, all of which are read as before.
        largest_difference: Of the outputs on some of them, in float64, as a share of the largest.
        held_out: What the figures below are of.
        held_out_texts: How many texts that is.
        same: Share of them that is read as before.
        unknown: Share of unknown tokens before and after.
        tokens_per_text: Mean number of tokens of a text before and after.
    """

    tokens: tuple[int, int]
    parameters: tuple[int, int]
    compared_texts: int
    largest_difference: float
    held_out: str
    held_out_texts: int
    same: float
    unknown: tuple[float, float]
    tokens_per_text: tuple[float, float]


def trim_vocabulary(
    model: PreTrainedModel,
    tokenizer: Any,
    corpus: Sequence[str],
    output: str | Path,
    options: TrimOptions | None = None,
    held_out: Sequence[str] | None = None,
) -> TrimResult:
    """Writes a model whose tokenizer and embeddings hold only what a corpus uses, special tokens, and a floor.

    Every text of the corpus is read as before, by the same tokens under new numbers; on some of them outputs are compared in
    float64. A decoder that is tied to the embeddings (masked language models) loses the same rows.

    Args:
        model: A text model; left as it is.
        tokenizer: Its fast tokenizer, of WordPiece, Unigram or BPE.
        corpus: Texts like those that the model will read.
        output: Directory for model, tokenizer and `vocabulary.json`; nothing in it is touched before all is verified.
        options: What stays besides; None: the defaults.
        held_out: Texts to report unknown tokens on; None: a tenth of the corpus, read by a vocabulary of the rest.

    Raises:
        ValueError: The tokenizer cannot be trimmed, the corpus is empty or holds items that are no text, or the model reads
            no text.
        RuntimeError: A text of the corpus would be read otherwise, or outputs differ.
    """
    options, output = options or TrimOptions(), Path(output)
    vocabulary = Vocabulary(tokenizer)
    _check(model, vocabulary, corpus, held_out)
    always = vocabulary.special | set(tokenizer.all_special_ids) | _ids_of(model)
    kept, content = _keep(vocabulary, corpus, always, options)
    _check_reading(vocabulary, content, kept, corpus)
    small = trimmed_model(model, kept)
    with writing_to(output):
        output.mkdir(parents=True, exist_ok=True)
        remove_staged(output, ".trimming-*")
        with tempfile.TemporaryDirectory(dir=output, prefix=".trimming-") as folder:
            staged = Path(folder)
            small.save_pretrained(staged)
            read = _save_tokenizer(tokenizer, content, staged, kept)
            largest = _check_outputs((model, tokenizer), (small, read), kept, corpus[:MOST_COMPARED])
            result = TrimResult(
                (len(vocabulary.tokens), len(kept)),
                (_count(model), _count(small)),
                len(corpus),
                largest,
                **_held_out(vocabulary, content, corpus, held_out, always, options),
            )
            record = {**asdict(options), **asdict(result)}
            (staged / "vocabulary.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
            for path in sorted(staged.iterdir(), key=lambda path: path.name == "config.json"):
                path.replace(output / path.name)
    return result


def copy_sentence_modules(source: str | Path, output: str | Path) -> None:
    """Copies what sentence-transformers saved beside a model (pooling, normalisation), which no vocabulary changes.

    Args:
        source: Directory of the model; nothing is copied where it is none, or holds no `modules.json`.
        output: Directory of the trimmed one.
    """
    source, output = Path(source), Path(output)
    if not (source / "modules.json").is_file():
        return
    with writing_to(output):
        for module in json.loads((source / "modules.json").read_text(encoding="utf-8")):
            folder = source / module["path"]
            if module["path"] and folder.is_dir() and folder.resolve().is_relative_to(source.resolve()):
                shutil.copytree(folder, output / folder.relative_to(source), dirs_exist_ok=True)
        for name in _SENTENCE_FILES:
            if (source / name).is_file():
                shutil.copy(source / name, output / name)


def trimmed_model(model: PreTrainedModel, kept: Sequence[int]) -> PreTrainedModel:
    """Returns a copy of `model` that embeds only these tokens, each under its position; tied weights stay tied.

    Args:
        model: The model; left as it is.
        kept: Ids of the tokens in ascending order.
    """
    small = copy.deepcopy(model)
    rows = torch.tensor(kept, device=small.get_input_embeddings().weight.device)
    cut = {id(weight): nn.Parameter(weight.detach()[rows], weight.requires_grad) for weight in _vocabulary_weights(small)}
    new = {old: position for position, old in enumerate(kept)}
    for module in small.modules():
        for name, weight in list(module._parameters.items()):
            if weight is None or id(weight) not in cut:
                continue
            setattr(module, name, cut[id(weight)])
            if isinstance(module, nn.Embedding):
                module.num_embeddings, module.padding_idx = len(kept), new.get(module.padding_idx)
            elif isinstance(module, nn.Linear):
                module.out_features = len(kept)
    small.config.vocab_size = len(kept)
    for name in _id_fields(small.config):
        setattr(small.config, name, new[getattr(small.config, name)])
    return small


def _vocabulary_weights(model: PreTrainedModel) -> list[nn.Parameter]:
    """The embeddings, and what a language model's decoder has a row of for each token."""
    decoder = model.get_output_embeddings()
    found = [model.get_input_embeddings().weight]
    if isinstance(decoder, nn.Linear):
        owners = [module for module in model.modules() if any(child is decoder for child in module.children())]
        biases = [getattr(module, "bias", None) for module in (decoder, *owners)]
        found += [decoder.weight, *(bias for bias in biases if isinstance(bias, nn.Parameter))]
    return found


def _id_fields(config: Any) -> list[str]:
    fields = (name for name in config.to_dict() if name.endswith("_token_id"))
    return [name for name in fields if isinstance(getattr(config, name, None), int)]


def _ids_of(model: PreTrainedModel) -> set[int]:
    """Tokens that the model's config names; and those before the padding token, where positions are counted from it."""
    config, rows = model.config, model.get_input_embeddings().weight.shape[0]
    found = {getattr(config, name) for name in _id_fields(config)}
    embeddings = getattr(model.base_model, "embeddings", None)
    if getattr(getattr(embeddings, "position_embeddings", None), "padding_idx", None) is not None:
        found |= set(range(config.pad_token_id + 1))
    return {i for i in found if 0 <= i < rows}


def _check(model: PreTrainedModel, vocabulary: Vocabulary, corpus: Any, held_out: Any) -> None:
    if model.main_input_name != "input_ids":
        raise ValueError(f"`{type(model).__name__}` reads no text: there is no vocabulary to trim.")
    for name, texts in (("corpus", corpus), ("held_out", held_out)):
        if texts is None and name == "held_out":
            continue
        if isinstance(texts, str) or not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"`{name}` must be a list of texts, at least one, got {texts!r:.80}.")
    rows, most = model.get_input_embeddings().weight.shape[0], max(vocabulary.tokens) + 1
    if most > rows:
        raise ValueError(f"The tokenizer has {most} tokens, but the model embeds {rows}: it is that of another model.")


def _keep(
    vocabulary: Vocabulary, texts: Sequence[str], always: set[int], options: TrimOptions
) -> tuple[list[int], dict[str, Any]]:
    """Returns the ids that stay, ascending, and the `tokenizer.json` that has only those."""
    kept = always | vocabulary.used_by(texts) | (vocabulary.alphabet if options.alphabet else set())
    closed, merges = vocabulary.closed(vocabulary.filled(kept, options.floor))
    found = sorted(closed)
    return found, vocabulary.trimmed(found, merges)


def _check_reading(vocabulary: Vocabulary, content: Mapping[str, Any], kept: Sequence[int], corpus: Sequence[str]) -> None:
    read, names = unlimited(content), np.array(kept)
    for text, before, after in zip(corpus, encode(vocabulary.backend, corpus), encode(read, corpus), strict=True):
        if before.ids != names[after.ids].tolist():
            raise RuntimeError(
                f"The trimmed tokenizer reads {text[:60]!r} as {after.tokens[:8]} instead of {before.tokens[:8]}: nothing was "
                f"written. Such a {vocabulary.kind} tokenizer cannot be trimmed."
            )


def _save_tokenizer(tokenizer: Any, content: Mapping[str, Any], folder: Path, kept: Sequence[int]) -> Any:
    """Saves the tokenizer with its new `tokenizer.json`, and returns it as it is opened from there."""
    tokenizer.save_pretrained(folder)
    for name in ("vocab.txt", "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json"):
        (folder / name).unlink(missing_ok=True)  # of the whole vocabulary
    (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    new = {str(old): str(position) for position, old in enumerate(kept)}
    if "added_tokens_decoder" in config:
        config["added_tokens_decoder"] = {new[i]: token for i, token in config["added_tokens_decoder"].items()}
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    read = AutoTokenizer.from_pretrained(folder)
    read.model_max_length = tokenizer.model_max_length
    return read


def _check_outputs(
    before: tuple[PreTrainedModel, Any], after: tuple[PreTrainedModel, Any], kept: Sequence[int], texts: Sequence[str]
) -> float:
    """Returns by how much outputs differ, as a share of the largest."""
    (model, _), (small, read) = before, after
    names = output_names(model)
    whole, cut = (make_batches(*pair, list(texts)) for pair in (before, after))
    old = np.array(kept)
    same = all(np.array_equal(a["input_ids"], old[b["input_ids"]]) for a, b in zip(whole, cut, strict=True))
    if not same:
        raise RuntimeError(
            f"`{type(read).__name__}` reads its trimmed `tokenizer.json` otherwise than it is written: nothing was written. "
            "Such a tokenizer cannot be trimmed."
        )
    rows = model.get_input_embeddings().weight.shape[0]
    expected: list[Arrays] = [
        {name: values[..., old] if name == "logits" and values.shape[-1] == rows else values for name, values in batch.items()}
        for batch in torch_outputs(model, names, whole)
    ]
    largest = difference(expected, torch_outputs(small, names, cut))
    if not largest <= SAME:
        raise RuntimeError(f"The trimmed model's outputs differ by {largest:.1e} of the largest: nothing was written.")
    return largest


def _held_out(
    vocabulary: Vocabulary,
    content: Mapping[str, Any],
    corpus: Sequence[str],
    held_out: Sequence[str] | None,
    always: set[int],
    options: TrimOptions,
) -> dict[str, Any]:
    """Reads texts that the vocabulary was not made from."""
    what = "texts that were given"
    if held_out is None:
        what = "every tenth text of the corpus, by a vocabulary made from the others"
        held_out = corpus[::HELD_OUT]
        rest = [text for i, text in enumerate(corpus) if i % HELD_OUT] or corpus
        _, content = _keep(vocabulary, rest, always, options)
    before, after = (list(encode(backend, held_out)) for backend in (vocabulary.backend, unlimited(content)))
    unknown = vocabulary.unknown
    token = None if unknown is None else vocabulary.tokens[unknown]
    return {
        "held_out": what,
        "held_out_texts": len(held_out),
        "same": float(np.mean([a.tokens == b.tokens for a, b in zip(before, after, strict=True)])),
        "unknown": (_share(before, token), _share(after, token)),
        "tokens_per_text": tuple(float(np.mean([len(e.tokens) for e in side])) for side in (before, after)),
    }


def _share(encodings: Sequence[tokenizers.Encoding], token: str | None) -> float:
    total = sum(len(encoding.tokens) for encoding in encodings)
    return sum(encoding.tokens.count(token) for encoding in encodings) / max(total, 1)


def _count(model: PreTrainedModel) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
