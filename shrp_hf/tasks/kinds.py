"""Kinds of task: what a label is, what of a model's output is compared with it, and what answering blindly would say."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

STRATA = 10  # of a regression: tenths of its rows by value


@dataclass(frozen=True)
class Kind:
    """One kind of task.

    Args:
        name: What `--task` calls it.
        problem_type: The value of `problem_type` in a Transformers config.
        metric_names: What it is judged by, the headline first.
        decide: Turns logits (rows, labels) into what the labels are compared with.
        constant: Returns the logits (labels,) of the best answer that does not look at the text, from the training labels
            and the number of labels.
        strata: Returns a value for each label; rows of one value are divided over the splits in equal shares.
    """

    name: str
    problem_type: str
    metric_names: tuple[str, ...]
    decide: Callable[[np.ndarray], np.ndarray]
    constant: Callable[[np.ndarray, int], np.ndarray]
    strata: Callable[[Sequence], list]


def _class(logits: np.ndarray) -> np.ndarray:
    return logits.argmax(axis=-1)


def _majority(labels: np.ndarray, count: int) -> np.ndarray:
    return np.bincount(labels.astype(int), minlength=count).astype(np.float64)


def _value(logits: np.ndarray) -> np.ndarray:
    return logits[:, 0].astype(np.float64)


def _mean(labels: np.ndarray, count: int) -> np.ndarray:
    return np.full(count, labels.astype(np.float64).mean())


def _tenths(labels: Sequence[float]) -> list[int]:
    order = np.argsort(np.argsort(np.asarray(labels), kind="stable"), kind="stable")
    return (order * STRATA // max(1, len(labels))).tolist()


def _set(logits: np.ndarray) -> np.ndarray:
    return (logits > 0).astype(np.int64)  # a sigmoid above one half


def _frequent(labels: np.ndarray, count: int) -> np.ndarray:
    shares = labels.mean(axis=0)
    return np.where((shares >= 0.5) | (np.arange(count) == shares.argmax()), 1.0, -1.0)


def _rarest(labels: Sequence[Sequence[float]]) -> list[int]:
    counts = np.asarray(labels).sum(axis=0)
    return [int(min(np.flatnonzero(row), key=lambda label: counts[label], default=-1)) for row in np.asarray(labels)]


CLASSIFICATION = Kind("classification", "single_label_classification", ("accuracy", "f1"), _class, _majority, list)
MULTILABEL = Kind("multilabel", "multi_label_classification", ("f1_micro", "f1_macro"), _set, _frequent, _rarest)
REGRESSION = Kind("regression", "regression", ("pearson", "spearmanr"), _value, _mean, _tenths)
KINDS = {kind.name: kind for kind in (CLASSIFICATION, MULTILABEL, REGRESSION)}
"""The kinds by name."""
