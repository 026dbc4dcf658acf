"""GLUE's metrics as local `evaluate` modules: `evaluate.load` fetches each from the Hub, these need no network."""

import math
from collections.abc import Sequence
from typing import Any

import evaluate
import numpy as np
from datasets import Features, List, Value
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from shrp_hf.defaults import SEED


class LocalMetric(evaluate.Metric):
    """Base of the metrics below: one number per metric, computed in memory.

    Differs from `evaluate.Metric` in its default `keep_in_memory=True`, so that nothing is written while computing.
    """

    value_type = "int64"
    takes_several = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"keep_in_memory": True, **kwargs})

    def _info(self) -> evaluate.MetricInfo:
        value = Value(self.value_type)
        value = List(value) if self.takes_several else value
        return evaluate.MetricInfo(
            description=self.__doc__,
            citation="",
            inputs_description="",
            features=Features({"predictions": value, "references": value}),
            format=None if self.takes_several else "numpy",
        )


class Accuracy(LocalMetric):
    """Share of predictions that equal their reference, 0 to 1."""

    def _compute(self, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
        return {"accuracy": float(accuracy_score(references, predictions))}


class F1(LocalMetric):
    """Harmonic mean of precision and recall, 0 to 1: of class 1, or `average="macro"` over all classes."""

    def _compute(self, predictions: np.ndarray, references: np.ndarray, average: str = "binary") -> dict[str, float]:
        return {"f1": float(f1_score(references, predictions, average=average, zero_division=0.0))}


class MicroF1(LocalMetric):
    """F1 over all decisions for all labels together, 0 to 1, where a row can have several: arrays (samples, labels)."""

    takes_several = True

    def _compute(self, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
        return {"f1_micro": float(f1_score(references, predictions, average="micro", zero_division=0.0))}


class MacroF1(LocalMetric):
    """Mean over the labels of the F1 of each, 0 to 1, where a row can have several: arrays (samples, labels)."""

    takes_several = True

    def _compute(self, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
        return {"f1_macro": float(f1_score(references, predictions, average="macro", zero_division=0.0))}


class MatthewsCorrelation(LocalMetric):
    """Matthews correlation coefficient, -1 to 1."""

    def _compute(self, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
        return {"matthews_correlation": float(matthews_corrcoef(references, predictions))}


class Pearson(LocalMetric):
    """Pearson correlation, -1 to 1; NaN where it is undefined: predictions or references are constant."""

    value_type = "float64"

    def _compute(self, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
        return {"pearson": _correlation(pearsonr, predictions, references)}


class Spearman(LocalMetric):
    """Spearman rank correlation, -1 to 1; NaN where it is undefined: predictions or references are constant."""

    value_type = "float64"

    def _compute(self, predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
        return {"spearmanr": _correlation(spearmanr, predictions, references)}


def _correlation(function: Any, predictions: np.ndarray, references: np.ndarray) -> float:
    return math.nan if _is_constant(predictions) or _is_constant(references) else float(function(predictions, references)[0])


def _is_constant(values: np.ndarray) -> bool:
    """Whether the values differ by no more than the rounding of float32, in which one constant varies from batch to batch."""
    return np.ptp(values) <= 16 * np.finfo(np.float32).eps * np.abs(values).max()


METRICS: dict[str, type[LocalMetric]] = {
    "accuracy": Accuracy,
    "f1": F1,
    "f1_macro": MacroF1,
    "f1_micro": MicroF1,
    "matthews_correlation": MatthewsCorrelation,
    "pearson": Pearson,
    "spearmanr": Spearman,
}


def measure(
    names: Sequence[str], predictions: np.ndarray, references: np.ndarray, average: str = "binary"
) -> dict[str, float]:
    """Computes several metrics over the same predictions.

    Args:
        names: Keys of `METRICS`.
        predictions: Class indices or values, shape (samples,).
        references: The labels, shape (samples,).
        average: How F1 treats classes: "binary" (of class 1) or "macro".

    Returns:
        One number per name.
    """
    results: dict[str, float] = {}
    for name in names:
        options = {"average": average} if name == "f1" else {}
        results.update(METRICS[name]().compute(predictions=predictions, references=references, **options))
    return results


def resample(
    name: str,
    predictions: Sequence[np.ndarray],
    references: np.ndarray,
    average: str = "binary",
    num_resamples: int = 1000,
    seed: int = SEED,
) -> np.ndarray:
    """Computes one metric of several models on rows drawn with replacement, the same rows for all of them.

    Args:
        name: A key of `METRICS`.
        predictions: Class indices or values of each model, shape (samples,).
        references: The labels, shape (samples,).
        average: As in `measure`.
        num_resamples: How often the rows are drawn.
        seed: Seed of the draws.

    Returns:
        Shape (models, num_resamples).
    """
    metric, options = METRICS[name](), {"average": average} if name == "f1" else {}
    generator = np.random.default_rng(seed)
    values = np.empty((len(predictions), num_resamples))
    for column in range(num_resamples):
        rows = generator.integers(len(references), size=len(references))
        for row, predicted in enumerate(predictions):
            # Without `compute`, whose tables in memory cost ten times the metric.
            values[row, column] = metric._compute(predicted[rows], references[rows], **options)[name]
    return values
