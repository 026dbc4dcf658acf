"""What answering without reading would reach: a model that is not above it has learned nothing worth compressing."""

import math

from datasets import Dataset

from shrp_hf.tasks.kind import Baseline
from shrp_hf.tasks.task import Task


def baseline_of(task: Task, rows: Dataset) -> Baseline:
    """Judges the answer that is best where nothing is read; see `Task.baseline`.

    Args:
        task: The task.
        rows: One of its splits.

    Raises:
        ImportError: The extra `metrics` is not installed.
    """
    return task.baseline(rows)


def check_learned(task: Task, quality: float | None, model_name: str) -> None:
    """Refuses a dense model that answers no better than one that reads nothing.

    Args:
        task: The task.
        quality: The model's `task.chosen_by` on the held-out rows; NaN or None where it is undefined.
        model_name: What the message calls it.

    Raises:
        ValueError: It is not above the majority class, or its correlation is not above 0.
    """
    baseline = baseline_of(task, task.validation)
    blind = baseline.metrics[task.chosen_by]
    quality = math.nan if quality is None else quality
    if quality > (0.0 if math.isnan(blind) else blind):
        return
    than = "above 0" if math.isnan(blind) else f"above the {blind:.4f} of the {baseline.name}"
    shown = "undefined" if math.isnan(quality) else f"{quality:.4f}"
    raise ValueError(
        f"The dense model {model_name!r} has learned nothing that could be kept: its {task.chosen_by} on the "
        f"{len(task.validation):,} held-out rows is {shown}, not {than}. Fine-tune it on this data first (`--dense-epochs`), "
        "check the order of its labels, or go on all the same with `--force`."
    )
