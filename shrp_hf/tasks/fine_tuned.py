"""Classifiers and regressors for a task: fine-tuned on it, or about to be."""

import logging

from transformers import AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel

from shrp_hf.checkpoints import open_model
from shrp_hf.pruning import to_shrp
from shrp_hf.tasks.task import Task

logger = logging.getLogger(__name__)

_SHORTEST = 3  # letters of an abbreviation, as in NEG for negative


def load_fine_tuned(name: str, task: Task) -> PreTrainedModel:
    """Opens a model that was fine-tuned on a task, as a Shrp model in float32, in evaluation mode.

    Args:
        name: Hub id or directory.
        task: Its task.

    Raises:
        ValueError: See `open_model`; or its head was never trained, predicts another number of labels or another kind of them,
            or numbers them otherwise than the task.
    """
    model, untrained = open_model(name, AutoModelForSequenceClassification)
    if untrained:
        raise ValueError(
            f"`{name}` has no trained task head ({untrained[0]} is missing): give a model that was fine-tuned on "
            f"{task.name!r}. `train`, `compare` and `compress` fine-tune it first by `--dense-epochs 3` (`dense_epochs`)."
        )
    check_labels(name, model.config, task)
    return to_shrp(model).eval()


def load_to_fine_tune(name: str, task: Task) -> PreTrainedModel:
    """Opens any encoder for fine-tuning on a task, as a Shrp model in float32; a head that is drawn anew is logged.

    Args:
        name: Hub id or directory.
        task: What it will learn.

    Raises:
        ValueError: See `open_model`.
    """
    model, untrained = open_model(name, AutoModelForSequenceClassification, **task.config_kwargs)
    if untrained:
        logger.warning("`%s` has no head for %r yet (%s): it begins untrained.", name, task.name, ", ".join(untrained))
    return to_shrp(model).eval()


def check_labels(name: str, config: PreTrainedConfig, task: Task) -> None:
    """Refuses a model whose outputs do not mean what the labels of a task mean.

    Args:
        name: What to call it.
        config: Its config.
        task: The task.

    Raises:
        ValueError: It predicts another number or kind of labels, or a label that both know has another number.
    """
    if config.num_labels != task.num_labels:
        raise ValueError(
            f"`{name}` predicts {config.num_labels} labels, but the task {task.name!r} has {task.num_labels}: give a model "
            "that was fine-tuned on it."
        )
    kind = getattr(config, "problem_type", None)
    if kind not in (None, task.problem_type):
        raise ValueError(
            f"`{name}` was fine-tuned for {kind!r} (`problem_type`), but the task {task.name!r} is {task.problem_type!r}: "
            "give a model that was fine-tuned on it."
        )
    theirs = [_plain(config.id2label[i]) for i in range(config.num_labels)]
    ours = [_plain(label) for label in task.label_names]
    moved = [(i, other) for i, label in enumerate(theirs) if (other := _find(label, ours)) not in (None, i)]
    if moved:
        raise ValueError(
            f"`{name}` numbers its labels {theirs}, but the task {task.name!r} numbers them {ours}: every prediction "
            "would be taken for another. Reorder the rows of its classifier, or fine-tune it on this task."
        )


def _plain(label: object) -> str:
    return " ".join(str(label).casefold().replace("_", " ").replace("-", " ").split())


def _find(label: str, names: list[str]) -> int | None:
    """Returns which of `names` is this label, abbreviated or not; None where none or several may be."""
    if label in names:
        return names.index(label)
    close = [
        i
        for i, name in enumerate(names)
        if min(len(label), len(name)) >= _SHORTEST and (name.startswith(label) or label.startswith(name))
    ]
    return close[0] if len(close) == 1 else None
