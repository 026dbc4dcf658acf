"""Arguments of ShrpTrainer, and the schedule that follows from them."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments, get_scheduler

from shrp_hf.training.stages import StageSchedule

_ORDERS = ("last_first", "first_first")
_STOCK_EPOCHS = 3.0


@dataclass
class ShrpTrainingArguments(TrainingArguments):
    """`TrainingArguments` plus the two stages of SHRP; without layers to convert it trains as stock arguments do.

    Stage "balance" converts one layer at a time under a balance loss; stage "specialise" drops that loss and lets Top-1
    routing specialise. The number of epochs follows from the stages (its default here is None); where `num_train_epochs` or
    `max_steps` is given, as in any script, the stages are scaled to it and keep their proportions. The learning rate is
    constant in "balance" and decays in "specialise".

    Args:
        num_expert_layers: Convert the last n layers.
        expert_layers: Convert these layers; instead of `num_expert_layers`.
        conversion_order: "last_first" or "first_first" (the paper's order is not known; the default is a reconstruction).
        balance_epochs_per_layer: Epochs that stage "balance" gives to each converted layer.
        specialise_epochs: Epochs of stage "specialise".
        balance_steps_per_layer: The same in optimizer steps; then `specialise_steps` is needed too, and nothing is scaled.
        specialise_steps: Optimizer steps of stage "specialise".
        balance_coef: Weight of the bidirectional KL in stage "balance".
        balance_learning_rate: Learning rate of stage "balance"; None: `learning_rate`.
        balance_lr_scheduler_type: Schedule of stage "balance"; `lr_scheduler_type` is that of stage "specialise".
        expander_learning_rate: Learning rate of routers and expanders, which begin without training; None: as the others.
        experts_per_sequence: Top-k of the routers of newly converted layers.
        router_pooling: "mean" or "cls"; what the routers of newly converted layers look at.
        usage_holdout: Share of the training set that is not trained on and on which `usage_plan` counts.
        task_weight: Weight of the task's own loss; 0: the teacher alone is followed, and labels make no difference.
        hidden_dropout: Dropout of hidden states in this training; None: as the model's config has it.
        attention_dropout: The same of attention weights.
        classifier_dropout: The same behind the base model, before a classifier.
        distillation_logits: With a teacher: weight of the logits' term, by the kind of task (see `logits_loss`).
        distillation_hidden_states: With a teacher: weight of the mean squared error of every layer's hidden states.
        distillation_value_relations: With a teacher: weight of the divergence of every layer's value relations.
        distillation_temperature: Temperature T of the logits.

    Raises:
        ValueError: Arguments contradict each other, or are out of range.
    """

    num_train_epochs: float | None = field(
        default=None, metadata={"help": "Total number of epochs; follows from the stages (3 where nothing is converted)."}
    )
    num_expert_layers: int | None = field(default=None, metadata={"help": "Convert the last n layers."})
    expert_layers: list[int] | None = field(default=None, metadata={"help": "Convert these layers."})
    conversion_order: str = field(default="last_first", metadata={"help": "Order of conversion.", "choices": list(_ORDERS)})
    balance_epochs_per_layer: float = field(default=1.0, metadata={"help": "Epochs of balance for each layer."})
    specialise_epochs: float = field(default=1.0, metadata={"help": "Epochs of stage specialise."})
    balance_steps_per_layer: int | None = field(default=None, metadata={"help": "Steps of balance for each layer."})
    specialise_steps: int | None = field(default=None, metadata={"help": "Steps of stage specialise."})
    balance_coef: float = field(default=0.1, metadata={"help": "Weight of the balance loss in stage balance."})
    balance_learning_rate: float | None = field(default=None, metadata={"help": "Learning rate of stage balance."})
    balance_lr_scheduler_type: str = field(default="constant", metadata={"help": "Schedule of stage balance."})
    expander_learning_rate: float | None = field(default=None, metadata={"help": "Learning rate of routers and expanders."})
    experts_per_sequence: int = field(default=1, metadata={"help": "Top-k of new routers."})
    router_pooling: str = field(default="mean", metadata={"help": "What routers look at.", "choices": ["mean", "cls"]})
    usage_holdout: float = field(default=0.05, metadata={"help": "Share of the training set kept to count usage on."})
    task_weight: float = field(default=1.0, metadata={"help": "Weight of the task's own loss."})
    hidden_dropout: float | None = field(default=None, metadata={"help": "Dropout of hidden states in this training."})
    attention_dropout: float | None = field(default=None, metadata={"help": "Dropout of attention weights."})
    classifier_dropout: float | None = field(default=None, metadata={"help": "Dropout before a classifier."})
    distillation_logits: float = field(default=1.0, metadata={"help": "Weight of logit distillation."})
    distillation_hidden_states: float = field(default=1.0, metadata={"help": "Weight of hidden-state distillation."})
    distillation_value_relations: float = field(default=0.0, metadata={"help": "Weight of value-relation distillation."})
    distillation_temperature: float = field(default=2.0, metadata={"help": "Temperature of logit distillation."})

    def __post_init__(self) -> None:
        """Checks the stages and, unless it is given, derives the length from them."""
        self._derived: tuple[float | None, int] = (None, -1)
        self.settle_stages_()
        super().__post_init__()

    def settle_stages_(self, num_layers: int | None = None) -> None:
        """Checks the stages and derives the length of the training from them, again where an argument was set since.

        Args:
            num_layers: How many layers are left to convert; None: all that the arguments name.

        Raises:
            ValueError: See the class.
        """
        self.forget_length_()
        self._check_ranges()
        epochs, steps = self.num_train_epochs, self.max_steps
        if self.num_requested_layers:
            self._derive_length(self.num_requested_layers if num_layers is None else num_layers)
            self._prepare_for_pending_layers()
        if self.num_train_epochs is None:
            self.num_train_epochs = _STOCK_EPOCHS
        self._derived = (self.num_train_epochs if epochs is None else None, self.max_steps if steps <= 0 else -1)

    def forget_length_(self) -> None:
        """Takes back the length that was derived from the stages, so that one that is set next counts as given."""
        epochs, steps = self._derived
        self._derived = (None, -1)
        if self.num_train_epochs == epochs:
            self.num_train_epochs = None
        if self.max_steps == steps:
            self.max_steps = -1

    @property
    def num_requested_layers(self) -> int:
        """Number of layers to convert, 0 if none was asked for."""
        return len(self.expert_layers) if self.expert_layers else self.num_expert_layers or 0

    def layers_to_convert(self, num_layers: int) -> list[int]:
        """The requested layers of a model with `num_layers`, in the order of conversion.

        Raises:
            ValueError: A layer is out of range.
        """
        if self.num_expert_layers is not None and self.num_expert_layers > num_layers:
            raise ValueError(f"`num_expert_layers` must be between 1 and {num_layers} layers, got {self.num_expert_layers}.")
        layers = self.expert_layers or range(num_layers - (self.num_expert_layers or 0), num_layers)
        for layer in layers:
            if not 0 <= layer < num_layers:
                raise ValueError(f"`expert_layers` names layer {layer}, but the model's layers are 0 to {num_layers - 1}.")
        return sorted(layers, reverse=self.conversion_order == "last_first")

    def schedule(self, layers: list[int], max_steps: int) -> StageSchedule:
        """Lays the conversion of `layers`, in this order, over `max_steps` optimizer steps: stages in epochs are scaled."""
        per_layer: float = self.balance_epochs_per_layer
        total = self._stage_epochs(len(layers))
        if self.balance_steps_per_layer is not None:
            per_layer, total = self.balance_steps_per_layer, max_steps
        scale = max_steps / total
        # Each before the last step at the latest: rounding must not leave a layer out.
        conversions = tuple((min(round(i * per_layer * scale), max_steps - 1), layer) for i, layer in enumerate(layers))
        return StageSchedule(conversions, round(len(layers) * per_layer * scale), max_steps)

    def are_stages_scaled(self, num_layers: int) -> bool:
        """Whether the stages of `num_layers` layers would take another time than the one that was given."""
        if self.balance_steps_per_layer is not None:
            return False
        return self.max_steps > 0 or abs(self.num_train_epochs - self._stage_epochs(num_layers)) > 1e-9

    def _stage_epochs(self, num_layers: int) -> float:
        return num_layers * self.balance_epochs_per_layer + self.specialise_epochs

    def _check_ranges(self) -> None:
        if self.num_expert_layers is not None and self.expert_layers is not None:
            raise ValueError(
                f"Give `num_expert_layers` or `expert_layers`, not both: got {self.num_expert_layers} and "
                f"{self.expert_layers}."
            )
        if self.num_expert_layers is not None and self.num_expert_layers < 1:
            raise ValueError(f"`num_expert_layers` must be at least 1, got {self.num_expert_layers}.")
        if self.expert_layers is not None and (
            not self.expert_layers or len(set(self.expert_layers)) != len(self.expert_layers)
        ):
            raise ValueError(f"`expert_layers` must name at least one layer, and none twice, got {self.expert_layers}.")
        if self.conversion_order not in _ORDERS:
            raise ValueError(f'`conversion_order` must be "last_first" or "first_first", got {self.conversion_order!r}.')
        self._check_numbers()
        if (self.balance_steps_per_layer is None) != (self.specialise_steps is None):
            raise ValueError(
                "`balance_steps_per_layer` and `specialise_steps` go together: got "
                f"{self.balance_steps_per_layer} and {self.specialise_steps}."
            )
        if self.balance_steps_per_layer is not None:
            for name in ("balance_epochs_per_layer", "specialise_epochs"):
                if getattr(self, name) != getattr(ShrpTrainingArguments, name):
                    raise ValueError(
                        f"`{name}={getattr(self, name)}` disagrees with `balance_steps_per_layer="
                        f"{self.balance_steps_per_layer}`: give the stages in epochs or in steps, not in both."
                    )

    def _check_numbers(self) -> None:
        for name in ("balance_epochs_per_layer", "balance_steps_per_layer", "expander_learning_rate"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"`{name}` must be more than 0, got {value}.")
        for name in (
            "specialise_epochs",
            "specialise_steps",
            "balance_coef",
            "task_weight",
            "distillation_logits",
            "distillation_hidden_states",
            "distillation_value_relations",
        ):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise ValueError(f"`{name}` must be 0 or more, got {value}.")
        for name in ("hidden_dropout", "attention_dropout", "classifier_dropout"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"`{name}` must be in [0, 1), got {value}.")
        if not self.distillation_temperature > 0:
            raise ValueError(f"`distillation_temperature` must be more than 0, got {self.distillation_temperature}.")
        if not 0 < self.usage_holdout < 1:
            raise ValueError(f"`usage_holdout` must be a share between 0 and 1, got {self.usage_holdout}.")

    def _derive_length(self, num_layers: int) -> None:
        if self.balance_steps_per_layer is None:
            if self.num_train_epochs is None and self.max_steps <= 0:
                self.num_train_epochs = self._stage_epochs(num_layers)
            return
        steps = self.num_requested_layers * self.balance_steps_per_layer + self.specialise_steps
        if self.max_steps > 0 and self.max_steps != steps:
            raise ValueError(
                f"`max_steps={self.max_steps}` disagrees with the stages, which take {steps} steps: leave it out, or give the "
                "stages in epochs, which are scaled to it."
            )
        self.max_steps = num_layers * self.balance_steps_per_layer + self.specialise_steps

    def _prepare_for_pending_layers(self) -> None:
        if self.fsdp:
            raise ValueError(
                f"`fsdp={self.fsdp!r}` cannot be used while layers are pending, because what runs changes under way. "
                "Convert under DDP, or at once with `from_pretrained(..., expert_layers=n)`."
            )
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = True
        for name in ("activation_checkpointing", "gradient_checkpointing"):
            kwargs_name = f"{name}_kwargs"
            if not getattr(self, name, None):
                continue
            kwargs = getattr(self, kwargs_name, None)
            if kwargs is None:
                setattr(self, kwargs_name, {"use_reentrant": False})
            elif isinstance(kwargs, dict) and kwargs.get("use_reentrant"):
                raise ValueError(
                    f"`{kwargs_name}={kwargs}` cannot be used while layers are pending: set `use_reentrant` to False."
                )


def check_processes(args: TrainingArguments) -> None:
    """Refuses a launch whose processes do not know of each other.

    Args:
        args: The arguments of a trainer.

    Raises:
        ValueError: The environment says that there are several processes, the arguments that there is one.
    """
    started = os.environ.get("WORLD_SIZE", "1")
    if args.world_size == 1 and started.isdigit() and int(started) > 1:
        raise ValueError(
            f"`WORLD_SIZE={started}` in the environment, but `args.world_size` is 1: each of these processes would train "
            "alone and write over the others' files. Without a GPU give `use_cpu=True` (`--use_cpu`); to train in one "
            "process, unset WORLD_SIZE or start it without a launcher."
        )


def rate_factor(args: ShrpTrainingArguments, schedule: StageSchedule) -> Callable[[int], float]:
    """Returns what the learning rate is multiplied by at each optimizer step.

    A constant (or `balance_lr_scheduler_type`) in stage "balance", then the usual decay in "specialise".

    Raises:
        ValueError: A schedule cannot be laid over a stage.
    """
    warmup = args.get_warmup_steps(schedule.max_steps)
    balance_type = args.balance_lr_scheduler_type
    if balance_type == "constant" and warmup:
        balance_type = "constant_with_warmup"
    balance = _rate(balance_type, warmup, schedule.balance_steps, None)
    specialise = _rate(args.lr_scheduler_type, 0, schedule.max_steps - schedule.balance_steps, args.lr_scheduler_kwargs)
    ratio = 1.0 if args.balance_learning_rate is None else args.balance_learning_rate / args.learning_rate

    def factor(step: int) -> float:
        if schedule.stage(step) == "balance":
            return ratio * balance(step)
        return specialise(step - schedule.balance_steps)

    return factor


def _rate(name: Any, warmup: int, steps: int, options: dict | None) -> Callable[[int], float]:
    """The factor of one of Transformers' schedules as a function of the step."""
    if steps <= 0:
        return lambda step: 0.0
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = get_scheduler(
        name, optimizer, num_warmup_steps=warmup, num_training_steps=steps, scheduler_specific_kwargs=options
    )
    if not hasattr(schedule, "lr_lambdas"):
        name = getattr(name, "value", name)
        raise ValueError(
            f"The learning-rate schedule `{name}` cannot be laid over a stage: choose one such as linear or cosine."
        )
    return schedule.lr_lambdas[0]


def check_lesson(args: TrainingArguments, teacher: Any) -> None:
    """Refuses a training without anything to learn from, or from what its teacher does not say.

    Args:
        args: The arguments; plain ones have our defaults.
        teacher: A model, the stored outputs of one, or None.

    Raises:
        ValueError: All weights are 0, or value relations are wanted of stored outputs.
    """
    names = ("task_weight", "distillation_logits", "distillation_hidden_states", "distillation_value_relations")
    task, *terms = (getattr(args, name, getattr(ShrpTrainingArguments, name)) for name in names)
    if not task and (teacher is None or not any(terms)):
        raise ValueError("`task_weight=0` leaves nothing to learn from: give a `teacher` and weights of its terms.")
    if terms[-1] and teacher is not None and not isinstance(teacher, nn.Module):
        raise ValueError(f"`distillation_value_relations={terms[-1]}` needs the teacher itself: its values are not stored.")


def recovery_arguments(output_dir: str, **overrides: Any) -> ShrpTrainingArguments:
    """Arguments that fine-tune a pruned model back, the same for every selector: CAHP's recipe (arXiv 2606.19150).

    3 epochs, learning rate 2e-5 with linear decay after 10% warm-up, batches of 32 sequences, weight decay 0.01,
    gradients clipped at norm 1.0. The batch is per device: on several, or with accumulation, override it to keep 32.

    Args:
        output_dir: As in TrainingArguments.
        **overrides: Any field of `ShrpTrainingArguments`; each takes the place of the recipe's.

    Raises:
        ValueError: See `ShrpTrainingArguments`.
    """
    recipe: dict[str, Any] = {
        "num_train_epochs": 3.0,
        "learning_rate": 2e-5,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0.1,  # below 1 it is a share of all steps
        "per_device_train_batch_size": 32,
        "weight_decay": 0.01,
        "max_grad_norm": 1.0,
    }
    return ShrpTrainingArguments(output_dir, **(recipe | overrides))
