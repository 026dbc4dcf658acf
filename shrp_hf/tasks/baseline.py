"""What answering without reading would reach: a model that is not above it has learned nothing worth compressing."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from datasets import Dataset
from transformers import EvalPrediction

from shrp_hf.tasks.kinds import CLASSIFICATION
from shrp_hf.tasks.task import Task


@dataclass(frozen=True)
class Baseline:
    """One answer for every row, learned from the training labels.

    Args:
        name: What a table calls it.
        metrics: What it reaches; NaN for the correlation of a constant, which is undefined.
    """

    name: str
    metrics: Mapping[str, float]

    def text(self) -> str:
        """Lists the metrics; an undefined one is a dash with its reason."""
        values = [f"{name} {'-' if math.isnan(value) else f'{value:.4f}'}" for name, value in self.metrics.items()]
        why = " (a constant has no correlation)" if any(map(math.isnan, self.metrics.values())) else ""
        return ", ".join(values) + why


def baseline_of(task: Task, rows: Dataset) -> Baseline:
    """Judges the answer that is best where nothing is read: the majority class, the frequent labels, the mean.

    Args:
        task: The task.
        rows: One of its splits.

    Raises:
        ImportError: The extra `metrics` is not installed.
    """
    labels = np.asarray(task.train["label"])
    logits = task.kind.constant(labels, task.num_labels)
    if task.is_regression:
        return Baseline(f"mean ({logits[0]:.4g})", dict.fromkeys(task.metric_names, math.nan))
    predictions = np.tile(logits, (len(rows), 1))
    metrics = task.compute_metrics(EvalPrediction(predictions, np.asarray(rows["label"])))
    chosen = [logits.argmax()] if task.kind is CLASSIFICATION else np.flatnonzero(logits > 0)
    what = "majority class" if task.kind is CLASSIFICATION else "frequent labels"
    return Baseline(f"{what} ({', '.join(task.label_names[index] for index in chosen)})", metrics)


def check_learned(task: Task, quality: float | None, model_name: str) -> None:
    """Refuses a dense model that answers no better than one that reads nothing.

    Args:
        task: The task.
        quality: The model's headline metric on the held-out rows; NaN or None where it is undefined.
        model_name: What the message calls it.

    Raises:
        ValueError: It is not above the majority class, or its correlation is not above 0.
    """
    baseline = baseline_of(task, task.validation)
    blind = baseline.metrics[task.headline]
    quality = math.nan if quality is None else quality
    if quality > (0.0 if math.isnan(blind) else blind):
        return
    than = "above 0" if math.isnan(blind) else f"above the {blind:.4f} of the {baseline.name}"
    shown = "undefined" if math.isnan(quality) else f"{quality:.4f}"
    raise ValueError(
        f"The dense model {model_name!r} has learned nothing that could be kept: its {task.headline} on the "
        f"{len(task.validation):,} held-out rows is {shown}, not {than}. Fine-tune it on this data first (`--dense-epochs`), "
        "check the order of its labels, or go on all the same with `--force`."
    )
