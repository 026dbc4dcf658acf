"""What rounding may change, where NaN and infinity come from, and training that stops at the first."""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import Trainer

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


class FiniteTrainer(Trainer):
    """`Trainer` that raises at a NaN or infinite loss or gradient, before an optimizer step spoils the weights.

    Stock Trainer goes on (and leaves such losses out of its logs), so a run is lost long before anyone looks. The gradients
    of fp16 are left to its loss scaler, which skips the steps in which they overflow.
    """

    _batch_of_step: tuple[int, int] = (-1, 0)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """As in Trainer.

        Raises:
            ValueError: The loss or a gradient is not finite; names step, batch and layer.
        """
        step, number = self.state.global_step, 1
        if self._batch_of_step[0] == step:
            number += self._batch_of_step[1]
        self._batch_of_step = step, number
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not loss.isfinite().all():
            self._stop(model, f"The loss is {loss.item()}", self._cause_of_loss(model, inputs))
        if self.accelerator.scaler is None:
            weights = [parameter for parameter in model.parameters() if parameter.grad is not None]
            if not _is_finite(nn.utils.get_total_norm([weight.grad for weight in weights], torch.inf)):
                # Gradients run from the last layer to the first.
                names = [name for name, weight in model.named_parameters() if weight.grad is not None]
                last = max(i for i, weight in enumerate(weights) if not _is_finite(weight.grad))
                cause = f"coming from the loss, the first one is that of `{names[last].removeprefix('module.')}`"
                self._stop(model, "A gradient is not finite", cause)
        return loss

    def _stop(self, model: nn.Module, what: str, cause: str) -> None:
        model.zero_grad()
        step, number = self._batch_of_step
        process = f" of process {self.args.process_index}" if self.args.world_size > 1 else ""
        raise ValueError(
            f"{what} at step {step + 1}, batch {number} of {self.current_gradient_accumulation_steps}{process}: {cause}. "
            "The weights are as they were before this step. Check that batch, lower the learning rate, or train in bf16 or "
            "float32 if this is fp16."
        )

    def _cause_of_loss(self, model: nn.Module, inputs: dict[str, Any]) -> str:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return "which layer it came from cannot be seen in sharded weights"
        with self.compute_loss_context_manager():
            return origin_of(self.accelerator.unwrap_model(model), self._prepare_inputs(inputs))


def origin_of(model: nn.Module, inputs: Mapping[str, Any]) -> str:
    """Says where in `model` a loss that is not finite came from; runs it once more, without gradients."""
    for name, weight in model.named_parameters():
        if not _is_finite(weight):
            return f"the weight `{name}` is not finite itself, so load a checkpoint from before that"
    name = first_not_finite(model, inputs)
    if name is None:
        return "the outputs of all layers are finite, so look at the labels and at what is added to the model's own loss"
    return f"the first output that is not finite is that of `{name}`"


def first_not_finite(model: nn.Module, inputs: Mapping[str, Any]) -> str | None:
    """Runs `model` once more, without gradients, and names the module whose output first holds NaN or infinity."""
    found: list[str] = []

    def look(name: str, module: nn.Module, args: tuple, output: Any) -> None:
        if not found and not all(map(_is_finite, _tensors(output))):
            found.append(name)

    handles = [module.register_forward_hook(partial(look, name)) for name, module in model.named_modules() if name]
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _is_finite(values: torch.Tensor) -> bool:
    return bool(values.detach().isfinite().all())


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, Mapping | tuple | list):
        for part in output.values() if isinstance(output, Mapping) else output:
            yield from _tensors(part)
