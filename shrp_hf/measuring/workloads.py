"""What models are served with: batches of one shape, or the sentences of a text file."""

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from shrp_hf.export.check import input_names
from shrp_hf.measuring.cost import count_flops, random_inputs
from shrp_hf.measuring.runtimes import Batch
from shrp_hf.models.lengths import num_positions


@dataclass(frozen=True)
class Workload:
    """Batches of a shape, or sentences: one call works through all of it.

    Args:
        batch_size: Sequences per batch.
        length: Tokens per sequence of a shape; of sentences, the most that are read, and None for as many as the model
            has positions for.
        texts: The sentences; empty for a shape.
    """

    batch_size: int
    length: int | None
    texts: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """What tables call it."""
        if self.texts:
            return f"{len(self.texts)} sentences, batches of {self.batch_size}"
        return f"{self.batch_size} x {self.length}"

    @property
    def num_sequences(self) -> int:
        """Sequences that a call works through."""
        return len(self.texts) or self.batch_size

    def batches(self, model: PreTrainedModel, processor: Any) -> list[Batch]:
        """Makes the batches for a model: random ids without padding, or its tokenizer's ids, sorted by length and padded.

        Args:
            model: The model, on the CPU.
            processor: Its tokenizer; a shape does not need it.

        Raises:
            ValueError: The shape or the sentences do not suit the model.
        """
        if not self.texts:
            return [random_inputs(model, self.batch_size, self.length)]
        if processor is None or model.main_input_name == "pixel_values":
            raise ValueError(f"`texts` need a text model with its tokenizer, and {type(model).__name__} has none.")
        limits = (num_positions(model), processor.model_max_length, self.length)
        longest = min(limit for limit in limits if limit is not None)
        names = input_names(model, processor)
        rows = processor(list(self.texts), truncation=True, max_length=longest)
        order = by_length(rows["input_ids"])
        made: list[Batch] = []
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            batch = processor.pad({name: [rows[name][row] for row in chosen] for name in rows}, return_tensors="pt")
            made.append({name: batch[name] for name in names})
        return made


def by_length(ids: Sequence[Sequence[int]]) -> list[int]:
    """Returns the order in which sentences are batched: indices of the token ids, the shortest first."""
    return sorted(range(len(ids)), key=lambda row: len(ids[row]))


def count_flops_of(model: PreTrainedModel, batches: Sequence[Batch]) -> int:
    """Counts the FLOPs of one forward pass of every batch, padding included, without computing any.

    Args:
        model: The model; a copy of its shape is counted.
        batches: From `Workload.batches`.
    """
    with torch.device("meta"):
        shape = copy.deepcopy(model).to("meta")
    sizes = Counter((batch["input_ids"] if "input_ids" in batch else batch["pixel_values"]).shape for batch in batches)
    return sum(count * count_flops(shape, size[0], size[-1]) for size, count in sizes.items())
