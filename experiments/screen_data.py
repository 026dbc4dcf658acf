"""Tokenised rows and weights in small files, so that a machine which reaches no hub and no data can train."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

MAX_LENGTH = 64
WORDS = "embeddings.word_embeddings.weight"
_BERT_NAMES = {
    "attention.attn.q": "attention.self.query",
    "attention.attn.k": "attention.self.key",
    "attention.attn.v": "attention.self.value",
    "attention.attn.o": "attention.output.dense",
    "attention.LayerNorm": "attention.output.LayerNorm",
}


def prepare(
    model: str, data_dir: Path | None, paths: Sequence[Path], tasks: Sequence[str], rows: int, *, extra: bool, packed: bool
) -> None:
    """Writes tokenised rows of the tasks and the weights of the encoder.

    Args:
        model: Hub id or directory of a BERT or MPNet encoder.
        data_dir: Where the tasks are.
        paths: Files to write, the weights about equally in all of them.
        tasks: Names of the tasks.
        rows: Most training rows of a task.
        extra: As many again, without use of their labels.
        packed: Matrices as 8-bit integers with a scale for each row; word embeddings only of what the tasks use.
    """
    from transformers import AutoModel, AutoTokenizer

    from shrp_hf.tasks.loading import load_task

    tokenizer = AutoTokenizer.from_pretrained(model)
    encoder = AutoModel.from_pretrained(model)
    config = encoder.config
    prepared: dict[str, Any] = {
        "shape": {"head_size": config.hidden_size // config.num_attention_heads, "eps": config.layer_norm_eps},
        "mask_id": tokenizer.mask_token_id,
        "tasks": {},
    }
    for name in tasks:
        task = load_task(name, data_dir, max_train=2 * rows if extra else rows)
        data = task.tokenize(tokenizer, max_length=MAX_LENGTH)
        train = data["train"]
        few = list(range(len(train)))[:rows]
        splits = {"train": train.select(few), "held_out": data["validation"], "reported": data["test"]}
        if extra:
            splits["extra"] = train.select(list(range(len(few), len(train))))
        prepared["tasks"][name] = {
            "num_labels": task.num_labels,
            "splits": {split: _padded(part) for split, part in splits.items()},
        }
    weights = {name: value.half() for name, value in bert_names(encoder.state_dict()).items()}
    if packed:
        used = [part["ids"].flatten() for task in prepared["tasks"].values() for part in task["splits"].values()]
        vocabulary = torch.cat([*used, torch.tensor([0, tokenizer.mask_token_id], dtype=torch.int16)]).unique()
        prepared["vocabulary"] = vocabulary, len(weights[WORDS])
        weights[WORDS] = weights[WORDS][vocabulary.long()]
        weights = {name: _packed(value) if value.dim() == 2 else value for name, value in weights.items()}
    parts: list[dict[str, Any]] = [{} for _ in paths]
    sizes = [0] * len(paths)
    rows_of = (split for task in prepared["tasks"].values() for split in task["splits"].values())
    sizes[-1] = sum(_size(tensor) for split in rows_of for tensor in split.values())
    for name, value in sorted(weights.items(), key=lambda item: -_size(item[1])):
        place = sizes.index(min(sizes))
        parts[place][name] = value
        sizes[place] += _size(value)
    for place, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save((prepared if place == len(paths) - 1 else {}) | {"weights": parts[place]}, path)


def read(paths: Sequence[Path]) -> dict[str, Any]:
    """Returns what `prepare` wrote, weights unpacked."""
    parts = [torch.load(path) for path in paths]
    prepared = {name: value for part in parts for name, value in part.items()}
    weights = {name: value for part in parts for name, value in part["weights"].items()}
    weights = {name: v[0].float() * v[1].float() if isinstance(v, tuple) else v.float() for name, v in weights.items()}
    if "vocabulary" in prepared:
        vocabulary, size = prepared["vocabulary"]
        words = torch.zeros(size, weights[WORDS].shape[1])
        words[vocabulary.long()] = weights[WORDS]
        weights[WORDS] = words
    return prepared | {"weights": weights}


def bert_names(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns an MPNet's weights under BERT's names; a BERT's as they are."""
    named = {}
    for name, value in weights.items():
        for theirs, ours in _BERT_NAMES.items():
            name = name.replace(theirs, ours)
        named[name] = value
    if "encoder.relative_attention_bias.weight" in named:
        positions = named["embeddings.position_embeddings.weight"]
        named["embeddings.position_embeddings.weight"] = positions[2:]  # 0 and 1 are of the padding
        named["embeddings.token_type_embeddings.weight"] = torch.zeros_like(positions[:1])
    return named


def _packed(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = (matrix.float().abs().amax(dim=1, keepdim=True) / 127).clamp(min=1e-12)
    return (matrix.float() / scale).round().to(torch.int8), scale


def _size(value: Any) -> int:
    return sum(part.nbytes for part in (value if isinstance(value, tuple) else (value,)))


def _padded(rows: Any) -> dict[str, torch.Tensor]:
    ids, types = torch.zeros(len(rows), MAX_LENGTH, dtype=torch.int16), torch.zeros(len(rows), MAX_LENGTH, dtype=torch.uint8)
    lengths = torch.zeros(len(rows), dtype=torch.int16)
    for i, row in enumerate(rows):
        lengths[i] = len(row["input_ids"])
        ids[i, : lengths[i]] = torch.tensor(row["input_ids"], dtype=torch.int16)
        if "token_type_ids" in row:
            types[i, : lengths[i]] = torch.tensor(row["token_type_ids"], dtype=torch.uint8)
    return {"ids": ids, "types": types, "lengths": lengths, "labels": torch.tensor(rows["label"], dtype=torch.float)}
