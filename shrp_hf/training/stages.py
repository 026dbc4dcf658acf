"""The stages of SHRP's training: what happens at which step, and what makes it happen."""

import logging
from dataclasses import dataclass
from typing import Any

from transformers import TrainerCallback

from shrp_hf.training.routing_log import RoutingLog

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StageSchedule:
    """When what happens, in optimizer steps.

    Args:
        conversions: (step, layer) pairs, ascending: before this step, this layer is converted.
        balance_steps: Length of stage "balance"; stage "specialise" takes the rest.
        max_steps: Length of the whole training.
    """

    conversions: tuple[tuple[int, int], ...]
    balance_steps: int
    max_steps: int

    def stage(self, step: int) -> str:
        """The stage in which the optimizer step with this index runs: "balance" or "specialise"."""
        return "balance" if step < self.balance_steps else "specialise"


class StageCallback(TrainerCallback):
    """Converts layers when their step has come, and switches the balance loss."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Makes the schedule, and goes back to where a checkpoint left it."""
        trainer, model = self.trainer, self.trainer._shrp_model()
        if model is not None:
            # What was counted before, or before the checkpoint, is logged already.
            trainer._routing = RoutingLog(model.usage())
        trainer._schedule = None
        if not trainer._layers_to_convert:
            return
        trainer._schedule = args.schedule(trainer._layers_to_convert, state.max_steps)
        if args.are_stages_scaled(len(trainer._layers_to_convert)) and state.is_world_process_zero:
            logger.warning(
                "The stages are scaled to the length that was given: stage balance takes %d of %d steps, stage specialise "
                "the rest.",
                trainer._schedule.balance_steps, state.max_steps,
            )  # fmt: skip
        for step, layer in trainer._schedule.conversions:
            if step < state.global_step:  # resumed: the checkpoint's weights are already converted here
                model.activate_layer_(layer, warm_start=False)
        self._weigh_balance_(args, state.global_step)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Converts what is due before this step."""
        schedule = self.trainer._schedule
        if schedule is None:
            return
        model = self.trainer._shrp_model()
        for step, layer in schedule.conversions:
            if step == state.global_step and layer not in model.config.expert_layers:
                model.activate_layer_(layer)
                logger.info("Step %d: layer %d is an expert layer from here on.", step, layer)
        if state.global_step == schedule.balance_steps:
            model.reset_usage_()  # what specialising experts are used for decides, not what balance forced
            self.trainer._routing.usage = {}
        self._weigh_balance_(args, state.global_step)

    def _weigh_balance_(self, args: Any, step: int) -> None:
        is_balance = self.trainer._schedule.stage(step) == "balance"
        self.trainer._shrp_model().config.router_aux_loss_coef = args.balance_coef if is_balance else 0.0
