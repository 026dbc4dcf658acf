"""The shapes of the cells of a comparison, and empty models of them to count and time."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Shape:
    """What a cell's speed depends on: which heads and layers were chosen makes no difference.

    Args:
        num_ordinary: Layers that are ordinary.
        num_heads: Heads in all of them; they are timed spread evenly, with which the FLOPs are the same.
        experts: Experts of each expert layer, ascending.
        thin: (heads, neurons) of each layer of a model of thin layers, of which nothing is spread.
    """

    num_ordinary: int
    num_heads: int
    experts: tuple[int, ...] = ()
    thin: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, cell: Mapping[str, Any]) -> Self:
        """The shape of a cell, from its record."""
        counts = [len(heads) for heads in cell["kept"]]
        expert_layers = set(cell["expert_layers"])
        ordinary = [count for layer, count in enumerate(counts) if layer not in expert_layers]
        neurons = cell.get("neurons")
        thin = tuple(zip(counts, neurons, strict=True)) if neurons is not None and not expert_layers else ()
        return cls(len(ordinary), sum(ordinary), tuple(sorted(counts[layer] for layer in expert_layers)), thin)

    @property
    def name(self) -> str:
        """For files and tables."""
        if self.thin:
            return f"thin layers of {'+'.join(f'{heads}x{neurons}' for heads, neurons in self.thin)}"
        return f"{self.num_ordinary} layers of {self.num_heads} heads, experts {'+'.join(map(str, self.experts)) or 'none'}"


def empty_model(dense: PreTrainedModel, shape: Shape) -> PreTrainedModel:
    """Builds a model of this shape with random weights.

    Args:
        dense: The dense Shrp model whose other sizes it has.
        shape: Its layers.
    """
    config = copy.deepcopy(dense.config)
    total = config.num_attention_heads
    each, more = divmod(shape.num_heads, max(1, shape.num_ordinary))
    counts = [each + (i < more) for i in range(shape.num_ordinary)] + list(shape.experts)
    if shape.thin:
        counts, config.intermediate_sizes = map(list, zip(*shape.thin, strict=True))
    config.num_hidden_layers = len(counts)
    config.kept_heads = None if all(count == total for count in counts) else [list(range(count)) for count in counts]
    config.expert_layers, config.routed = list(range(shape.num_ordinary, len(counts))), False
    with torch.random.fork_rng():
        return type(dense)(config).eval()
