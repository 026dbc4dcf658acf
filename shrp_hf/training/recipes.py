"""Recipes: how a dense model is fine-tuned, converted and recovered, the same for every method that is compared."""

import copy
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from datasets import DatasetDict
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
)
from transformers.trainer_callback import TrainerState

from shrp_hf.defaults import BATCH_SIZE, CALIBRATION_SAMPLES, SEED
from shrp_hf.models.outputs import PAIRS, embedding_of
from shrp_hf.plans.budget import Budget
from shrp_hf.plans.keep_plan import KeepPlan
from shrp_hf.pruning import prune_heads, to_shrp
from shrp_hf.selectors import SELECTORS
from shrp_hf.selectors.usage import plan_by_usage
from shrp_hf.training.arguments import ShrpTrainingArguments
from shrp_hf.training.contrast import EPOCHS, LEARNING_RATE, PairCollator, PairTrainer
from shrp_hf.training.sampling import RowCollator, calibration_batches
from shrp_hf.training.teacher_outputs import TeacherOutputs
from shrp_hf.training.trainer import ShrpTrainer

logger = logging.getLogger(__name__)
TrainerKind = TypeVar("TrainerKind", bound=Trainer)

EXPERT_SELECTORS = ("usage", "his", "hies", "entropy", "magnitude", "random")
"""What may choose the experts that stay: the usage of trained routers (SHRP), or scores of the heads of the dense model."""


@dataclass(frozen=True)
class Recipe:
    """How a dense model becomes a static SHRP model.

    An epoch is `Setup.examples_per_epoch` examples where that is given, else the whole training set.

    Args:
        name: What tables and cards call it.
        balance_epochs_per_layer: Epochs of stage "balance" for each layer.
        specialise_epochs: Epochs of stage "specialise".
        recovery_epochs: Epochs after the router and the other experts are gone.
        learning_rate: Of both stages.
        recovery_learning_rate: After pruning.
        expander_learning_rate: Of routers and expanders, which begin without training; None: as the others.
        balance_coef: Weight of the balance loss in stage "balance".
        experts_per_sequence: Top-k of the routers.
        expert_selector: A name in `EXPERT_SELECTORS`. "usage": routers choose the experts in training, as in SHRP. Another:
            the best heads of each layer by that score in the dense model are its experts from the start, without routers
            and stages, all layers at once; the recovery is all that trains them (ours, not the paper's).
        task_weight: Weight of the task's loss; 0: the teacher alone is followed.
        hidden_dropout: Dropout of hidden states while a student learns; None: as its config has it.
        attention_dropout: The same of attention weights.
        classifier_dropout: The same before the classifier.
        distillation_logits: Weight of the teacher's logits. With this and the next two at 0 nobody teaches.
        distillation_hidden_states: Weight of the teacher's hidden states.
        distillation_value_relations: Weight of the teacher's value relations.

    Raises:
        ValueError: There is no such `expert_selector`, or a learning rate is not above 0.
    """

    name: str
    balance_epochs_per_layer: float = 1.0
    specialise_epochs: float = 2.0
    recovery_epochs: float = 0.0
    learning_rate: float = 3e-4
    recovery_learning_rate: float = 3e-4
    expander_learning_rate: float | None = None
    balance_coef: float = 0.1
    experts_per_sequence: int = 1
    expert_selector: str = "usage"
    task_weight: float = 1.0
    hidden_dropout: float | None = None
    attention_dropout: float | None = None
    classifier_dropout: float | None = None
    distillation_logits: float = 0.0
    distillation_hidden_states: float = 0.0
    distillation_value_relations: float = 0.0

    def __post_init__(self) -> None:
        if self.expert_selector not in EXPERT_SELECTORS:
            raise ValueError(f"`expert_selector` must be one of {', '.join(EXPERT_SELECTORS)}, got {self.expert_selector!r}.")

        for name in ("learning_rate", "recovery_learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` must be above 0, got {getattr(self, name)!r}.")

    @property
    def routes(self) -> bool:
        """Whether routers choose the experts."""
        return self.expert_selector == "usage"

    def conversion_epochs(self, num_layers: int) -> float:
        """Epochs from the dense model to one with `num_layers` converted layers, before the recovery; 0 without routers."""
        return self.balance_epochs_per_layer * num_layers + self.specialise_epochs if self.routes else 0.0

    @property
    def distils(self) -> bool:
        """Whether the dense model teaches."""
        return any(getattr(self, name) for name in _TERMS)

    @property
    def arguments(self) -> dict[str, Any]:
        """The fields of `ShrpTrainingArguments` in which every training of a student follows the recipe."""
        return {name: getattr(self, name) for name in ("expander_learning_rate", "task_weight", *_DROPOUTS, *_TERMS)}

    @property
    def control(self) -> "Recipe":
        """How the dense model itself is trained on, for comparison: with the labels, as its own teacher tells it nothing."""
        return replace(self, task_weight=self.task_weight or 1.0)


_OF_ROUTERS = ("balance_epochs_per_layer", "specialise_epochs", "balance_coef", "experts_per_sequence")
_DROPOUTS = ("hidden_dropout", "attention_dropout", "classifier_dropout")
_TERMS = ("distillation_logits", "distillation_hidden_states", "distillation_value_relations")

RECIPES: Mapping[str, Recipe] = {
    "default": Recipe(
        "default",
        balance_epochs_per_layer=0.5,
        specialise_epochs=1.0,
        recovery_epochs=5.0,
        expander_learning_rate=2e-3,
        expert_selector="his",
        task_weight=0.0,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        classifier_dropout=0.0,
        distillation_logits=1.0,
        distillation_hidden_states=10.0,
    ),
    "paper": Recipe("paper"),
}
"""By name. "paper" is SHRP as published (arXiv 2512.20635): cross-entropy alone, nothing after pruning; its epochs and
learning rate are not published in what we could read, so they are a reconstruction. "default" is what kept most on held-out
rows of four tasks, for expert and for thin layers alike: the teacher alone, without dropout; docs/results/recipe.md has what
was tried."""


def find_recipe(name: str, **changes: Any) -> Recipe:
    """Returns the recipe of that name, with the fields changed that are not None.

    Raises:
        ValueError: There is no recipe of that name, or a change is about routers, which it has not.
    """
    if name not in RECIPES:
        raise ValueError(f"`recipe` must be one of {', '.join(RECIPES)}, got {name!r}.")
    changes = {field: value for field, value in changes.items() if value is not None}
    recipe = replace(RECIPES[name], **changes)
    idle = [field for field in _OF_ROUTERS if field in changes and not recipe.routes]
    if idle:
        raise ValueError(
            f"`{idle[0]}={changes[idle[0]]}` is about routers, which the recipe {name!r} has not: leave it out, or choose the "
            "experts by usage (`--expert-selector usage`)."
        )
    return recipe


@dataclass(frozen=True, eq=False)
class Setup:
    """What all trainings of one run share.

    Args:
        data: Tokenised splits "train" and "validation", as from `Task.tokenize`.
        tokenizer: Pads the batches.
        folder: Directory for checkpoints, a folder for each training.
        seed: Seed of everything that is drawn.
        batch_size: Sequences per step.
        examples_per_epoch: Examples that count as an epoch, drawn without replacement from the whole training set; None:
            all of it. A conversion sees 5% fewer, which `ShrpTrainer` sets aside.
        bf16: Train in bfloat16 autocast.
        resumable: Save a checkpoint an epoch, and take the last one up.
        bar: Shows how far a training is, in place of what `Trainer` prints.
        stores_teacher: Compute what a teacher says once, in `folder`, where a training sees its rows more than once; never
            for value relations.
    """

    data: DatasetDict
    tokenizer: PreTrainedTokenizerBase
    folder: Path
    seed: int = SEED
    batch_size: int = BATCH_SIZE
    examples_per_epoch: int | None = None
    bf16: bool = False
    resumable: bool = True
    bar: TrainerCallback | None = None
    stores_teacher: bool = True

    @property
    def epoch(self) -> float:
        """Length of an epoch as a share of the training set."""
        rows = len(self.data["train"])
        return 1.0 if self.examples_per_epoch is None else min(1.0, self.examples_per_epoch / rows)

    def arguments(self, name: str, **kwargs: Any) -> ShrpTrainingArguments:
        """Arguments of the training called `name`; epochs in `kwargs` are those of the training set."""
        steps = max(1, int(self.epoch * len(self.data["train"]) / self.batch_size))
        saving = {"save_strategy": "steps", "save_steps": steps, "save_total_limit": 1}
        return ShrpTrainingArguments(
            output_dir=str(self.folder / name),
            per_device_train_batch_size=self.batch_size,
            per_device_eval_batch_size=2 * self.batch_size,
            seed=self.seed,
            logging_steps=20,
            warmup_steps=20,
            train_sampling_strategy="group_by_length",
            report_to="none",
            bf16=self.bf16,
            use_cpu=self.bf16 and not torch.cuda.is_available(),  # Transformers wants it said for bfloat16 there
            dataloader_pin_memory=torch.cuda.is_available(),
            **(saving if self.resumable else {"save_strategy": "no"}),
            **kwargs,
        )

    def may_store(self, epochs: float, value_relations: float = 0.0) -> bool:
        """Whether what a teacher says is computed once, before a training: it sees rows again, and needs no teacher's values.

        Args:
            epochs: Of the training.
            value_relations: Weight of the teacher's value relations.
        """
        is_right = self.tokenizer.padding_side == "right"
        return self.stores_teacher and epochs * self.epoch > 1 and not value_relations and is_right

    def train(self, trainer: Trainer) -> PreTrainedModel:
        """Trains, from the last checkpoint if there is one; returns the model, in evaluation mode."""
        folder = Path(trainer.args.output_dir)
        trainer.train(resume_from_checkpoint=last_whole_checkpoint(folder))
        return trainer.accelerator.unwrap_model(trainer.model).eval()


def last_whole_checkpoint(folder: Path) -> str | None:
    """Returns the last checkpoint of a training that was written to its end, if there is one.

    Trainer writes a checkpoint file by file, its state last: a kill can leave one without, or with half of it.
    """
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=lambda path: -int(path.name.partition("-")[2])):
        try:
            TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        except (OSError, ValueError, TypeError):
            continue
        return str(checkpoint)
    return None


def fine_tune(
    model: PreTrainedModel, setup: Setup, epochs: float, learning_rate: float, *, name: str, **kwargs: Any
) -> PreTrainedModel:
    """Trains a stock, dense, pruned or truncated model; returns it in evaluation mode.

    Args:
        model: The model; it is trained in place.
        setup: What all trainings of the run share.
        epochs: Epochs; 0 changes nothing.
        learning_rate: At the start; it decays linearly.
        name: Name of the training, for its checkpoints.
        **kwargs: `teacher`, a fine-tuned model that teaches, and fields of `ShrpTrainingArguments`.
    """
    if not epochs:
        return model.eval()
    teacher = kwargs.pop("teacher", None)
    if teacher is not None and setup.may_store(epochs, kwargs.get("distillation_value_relations", 0.0)):
        teacher = stored(teacher, setup, hidden_states=bool(kwargs.get("distillation_hidden_states", True)))
    args = setup.arguments(name, num_train_epochs=epochs * setup.epoch, learning_rate=learning_rate, **kwargs)
    return setup.train(_trainer(model, args, setup, teacher))


def recover(
    model: PreTrainedModel, dense: PreTrainedModel, setup: Setup, recipe: Recipe, *, name: str = "recover"
) -> PreTrainedModel:
    """Trains a pruned or truncated model back by `recipe`, the same for every method.

    Args:
        model: The smaller model; it is trained in place. An embedding model ends on pairs, where some came along.
        dense: The dense model, which teaches where the recipe says so.
        setup: What all trainings of the run share.
        recipe: How.
        name: Name of the training, for its checkpoints.
    """
    check_lesson_of(recipe, has_labels=embedding_of(model) is None)
    teacher = dense if recipe.distils else None
    epochs, rate = recipe.recovery_epochs, recipe.recovery_learning_rate
    model = fine_tune(model, setup, epochs, rate, name=name, teacher=teacher, **recipe.arguments)
    return contrast(model, setup, name=name) if epochs and PAIRS in setup.data else model


def contrast(model: PreTrainedModel, setup: Setup, *, name: str) -> PreTrainedModel:
    """Trains an embedding model for an epoch on the pairs that came along; returns it in evaluation mode.

    Args:
        model: The model; it is trained in place.
        setup: What all trainings of the run share; its split "pairs" has the pairs.
        name: Name of the training before it, for checkpoints.
    """
    args = setup.arguments(
        f"{name}-contrast", num_train_epochs=EPOCHS, learning_rate=LEARNING_RATE, remove_unused_columns=False
    )
    collator = PairCollator(setup.tokenizer)
    return setup.train(_watched(PairTrainer(model, args, collator, setup.data[PAIRS]), setup))


def check_lesson_of(recipe: Recipe, has_labels: bool) -> None:
    """Refuses a recipe by which a model would learn nothing.

    Args:
        recipe: How it is to be trained.
        has_labels: Whether there are labels; an embedding model has none.

    Raises:
        ValueError: There are neither labels nor a teacher, though it is to be trained.
    """
    if not has_labels and not recipe.distils and (recipe.recovery_epochs or recipe.routes):
        raise ValueError(
            f"`recipe` {recipe.name!r} has no teacher, and an embedding model has no labels: take `default`, in which the "
            "dense model teaches."
        )


def stored(teacher: PreTrainedModel, setup: Setup, *, hidden_states: bool = True) -> PreTrainedModel | TeacherOutputs:
    """Returns what `teacher` says about the training rows, computed once for all trainings of the run.

    Args:
        teacher: The teacher.
        setup: What all trainings of the run share.
        hidden_states: Whether hidden states are wanted too.

    Returns:
        Its outputs; the teacher itself where the tokenizer pads on the left, or the disk has not twice the room for them.
    """
    if setup.tokenizer.padding_side != "right":
        return teacher
    rows, config = setup.data["train"], teacher.config
    tokens = sum(map(len, rows["input_ids"]))
    size = 2 * tokens * (config.num_hidden_layers + 1) * config.hidden_size * hidden_states
    setup.folder.mkdir(parents=True, exist_ok=True)
    if 2 * size > shutil.disk_usage(setup.folder).free:
        logger.warning("The teacher's outputs take %.1f GB, too much for %s: it runs in each step.", size / 1e9, setup.folder)
        return teacher
    teacher = teacher.to("cuda" if torch.cuda.is_available() else teacher.device)
    return TeacherOutputs.compute(
        teacher, rows, RowCollator(setup.tokenizer), setup.folder / "teacher", hidden_states=hidden_states
    )


def convert(
    dense: PreTrainedModel, layers: Sequence[int], setup: Setup, recipe: Recipe, *, keep: int = 1, name: str = "convert"
) -> PreTrainedModel:
    """Converts layers of a copy of `dense`: with routers through both stages, or by a cut to the heads that score best.

    Args:
        dense: The fine-tuned dense model, which also teaches where the recipe says so.
        layers: Indices of the layers.
        setup: What all trainings of the run share.
        recipe: How.
        keep: Experts of each layer, where no routers choose them.
        name: Name of the training, for its checkpoints.

    Returns:
        The routed model, its usage counted on the held-out rows; or, without routers, the static one, not yet trained.

    Raises:
        ValueError: `keep` is out of range, or see `ShrpTrainer`; for example a layer is out of range.
    """
    student = copy.deepcopy(dense).requires_grad_(True).train()  # a dense model that taught before comes frozen
    if not recipe.routes:
        student = to_shrp(student)
        student.convert_layers_(list(layers))
        return prune_heads(student, best_experts(dense, layers, setup, recipe.expert_selector, keep)).eval()
    args = setup.arguments(
        name,
        expert_layers=list(layers),
        balance_epochs_per_layer=recipe.balance_epochs_per_layer * setup.epoch,
        specialise_epochs=recipe.specialise_epochs * setup.epoch,
        balance_coef=recipe.balance_coef,
        experts_per_sequence=recipe.experts_per_sequence,
        learning_rate=recipe.learning_rate,
        **recipe.arguments,
    )
    trainer = _trainer(student, args, setup, dense if recipe.distils else None)
    model = setup.train(trainer)
    trainer.count_usage(setup.data["validation"])
    return model


def best_experts(dense: PreTrainedModel, layers: Sequence[int], setup: Setup, selector: str, keep: int = 1) -> KeepPlan:
    """Chooses, in each of `layers`, the heads of the dense model that score best; other layers keep theirs.

    Args:
        dense: The fine-tuned dense model.
        layers: Indices of the layers.
        setup: Its training rows are those that heads are scored on, `CALIBRATION_SAMPLES` of them drawn by its seed.
        selector: A name in `EXPERT_SELECTORS`, but "usage".
        keep: Heads of each layer.

    Raises:
        ValueError: `keep` is out of range.
    """
    config = dense.config
    if not 1 <= keep <= config.num_attention_heads:
        raise ValueError(f"`keep` must be between 1 and {config.num_attention_heads} experts, got {keep}.")
    others = [layer for layer in range(config.num_hidden_layers) if layer not in layers]
    options: dict[str, Any] = {"seed": setup.seed} if selector == "random" else {}
    chooser = SELECTORS[selector](budget=Budget.heads(keep * len(layers)), per_layer=True, frozen_layers=others, **options)
    train, shape = setup.data["train"], {"batch_size": setup.batch_size, "seed": setup.seed}
    batches = calibration_batches(train, setup.tokenizer, CALIBRATION_SAMPLES, **shape)
    return chooser.select(dense.to("cuda" if torch.cuda.is_available() else dense.device), batches)


def without_routers(model: PreTrainedModel, keep: int) -> PreTrainedModel:
    """Returns a new model without routers: the `keep` most used experts of each layer stay.

    Args:
        model: From `convert`; left as it is. Where no routers chose its experts, all of them stay.
        keep: Experts of each layer.
    """
    return prune_heads(model, plan_by_usage(model, model.usage(), keep=keep)) if model.config.routed else copy.deepcopy(model)


def _trainer(
    model: PreTrainedModel, args: ShrpTrainingArguments, setup: Setup, teacher: PreTrainedModel | TeacherOutputs | None
) -> ShrpTrainer:
    trainer = ShrpTrainer(
        to_shrp(model),
        args,
        data_collator=RowCollator(setup.tokenizer),
        train_dataset=setup.data["train"],
        processing_class=setup.tokenizer,
        teacher=teacher,
    )
    return _watched(trainer, setup)


def _watched(trainer: TrainerKind, setup: Setup) -> TrainerKind:
    if setup.bar is not None:
        for callback in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(callback)
        trainer.add_callback(setup.bar)
    return trainer
