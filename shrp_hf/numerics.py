"""What rounding may change, and where NaN and infinity come from."""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

ROUNDINGS = 1024
"""Roundings of its largest value that an encoder's output may be off, whatever the processor: a sum of n products is off by at
most n of them in any order, by some sqrt(n) as a rule, n is 3,072 at BERT-base, and a dozen layers add theirs."""


def rounding_bound(scale: float, dtype: torch.dtype, roundings: int = ROUNDINGS) -> float:
    """Most that outputs computed in `dtype` may be away from the same ones computed in float64, on any processor.

    A head, a neuron or a mask that is wrong changes far more.

    Args:
        scale: Largest absolute value of the outputs in float64; counts as at least 1.
        dtype: What was computed in.
        roundings: How many, each `torch.finfo(dtype).eps` of the scale; by default 1.2e-4 of it for float32.
    """
    return roundings * torch.finfo(dtype).eps * max(1.0, scale)


def origin_of(model: nn.Module, inputs: Mapping[str, Any]) -> str:
    """Says where in `model` a loss that is not finite came from; runs it once more, without gradients."""
    for name, weight in model.named_parameters():
        if not is_finite(weight):
            return f"the weight `{name}` is not finite itself, so load a checkpoint from before that"
    name = first_not_finite(model, inputs)
    if name is None:
        return "the outputs of all layers are finite, so look at the labels and at what is added to the model's own loss"
    return f"the first output that is not finite is that of `{name}`"


def first_not_finite(model: nn.Module, inputs: Mapping[str, Any]) -> str | None:
    """Runs `model` once more, without gradients, and names the module whose output first holds NaN or infinity."""
    found: list[str] = []

    def look(name: str, module: nn.Module, args: tuple, output: Any) -> None:
        if not found and not all(map(is_finite, _tensors(output))):
            found.append(name)

    handles = [module.register_forward_hook(partial(look, name)) for name, module in model.named_modules() if name]
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def is_finite(values: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite."""
    return bool(values.detach().isfinite().all())


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, Mapping | tuple | list):
        for part in output.values() if isinstance(output, Mapping) else output:
            yield from _tensors(part)
