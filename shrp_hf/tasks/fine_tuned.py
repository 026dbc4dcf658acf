"""Models for a task: fine-tuned on it, or about to be."""

import logging

from transformers import PreTrainedModel

from shrp_hf.pruning import to_shrp
from shrp_hf.tasks.task import Task

logger = logging.getLogger(__name__)


def load_fine_tuned(name: str, task: Task) -> PreTrainedModel:
    """Opens a model that was fine-tuned on a task, as a Shrp model in float32, in evaluation mode.

    Args:
        name: Hub id or directory.
        task: Its task.

    Raises:
        ValueError: See `open_model`; or its head was never trained, predicts another number of labels or another kind of them,
            or numbers them otherwise than the task.
    """
    model, untrained = task.kind.open(name)
    if untrained:
        raise ValueError(
            f"`{name}` has no trained task head ({untrained[0]} is missing): give a model that was fine-tuned on "
            f"{task.name!r}. `train`, `compare` and `compress` fine-tune it first by `--dense-epochs 3` (`dense_epochs`)."
        )
    task.kind.check_model(name, model.config, task.label_names, task.name)
    return to_shrp(model).eval()


def load_to_fine_tune(name: str, task: Task) -> PreTrainedModel:
    """Opens any encoder for fine-tuning on a task, as a Shrp model in float32; a head that is drawn anew is logged.

    Args:
        name: Hub id or directory.
        task: What it will learn.

    Raises:
        ValueError: See `open_model`; or the task has no labels.
    """
    if not task.kind.is_tuned:
        raise ValueError(f"The task {task.name!r} ({task.kind.name}) has no labels to fine-tune on: set `dense_epochs` to 0.")
    model, untrained = task.kind.open(name, **task.config_kwargs)
    if untrained:
        logger.warning("`%s` has no head for %r yet (%s): it begins untrained.", name, task.name, ", ".join(untrained))
    return to_shrp(model).eval()
