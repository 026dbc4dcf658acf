"""Training that stops at the first NaN or infinity."""

from typing import Any

import torch
from torch import nn
from transformers import Trainer

from shrp_hf.numerics import is_finite, origin_of


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
            # The norm costs a ninth of looking at every number. Its squares may overflow where no gradient does.
            if not is_finite(nn.utils.get_total_norm([weight.grad for weight in weights])):
                wrong = [i for i, weight in enumerate(weights) if not is_finite(weight.grad)]
                if wrong:  # gradients run from the last layer to the first
                    names = [name for name, weight in model.named_parameters() if weight.grad is not None]
                    cause = f"coming from the loss, the first one is that of `{names[wrong[-1]].removeprefix('module.')}`"
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
