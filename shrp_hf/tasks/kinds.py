"""The kinds of task by name, and the three whose rows have one label, several, or a number."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from datasets import Dataset
from transformers import EvalPrediction

from shrp_hf.tasks.embeddings import Embeddings
from shrp_hf.tasks.kind import NEEDS_METRICS, Baseline, Kind, check_finite
from shrp_hf.tasks.ranking import Ranking
from shrp_hf.tasks.tokens import Tokens

STRATA = 10  # of a regression: tenths of its rows by value
_MOST_SHOWN = 8  # classes that are named


class LabelKind(Kind):
    """A kind whose rows are texts, or pairs of them, with a `label`."""

    @abstractmethod
    def strata(self, labels: Sequence) -> list:
        """Returns a value for each label; rows of one value are divided over the splits in equal shares."""

    @abstractmethod
    def constant(self, labels: np.ndarray, count: int) -> np.ndarray:
        """Returns the logits (labels,) of the best answer that does not look at the text, from the training labels."""

    @abstractmethod
    def chosen(self, logits: np.ndarray) -> np.ndarray:
        """Turns logits (rows, labels) into what the labels are compared with."""

    def decide(self, prediction: EvalPrediction, label_names: Sequence[str]) -> np.ndarray:
        """Returns the predicted classes, labels or values, (rows,) or (rows, labels)."""
        return self._compared(prediction, label_names)[0]

    def judge(self, prediction: EvalPrediction, names: Sequence[str], label_names: Sequence[str]) -> dict[str, float]:
        """One number per name, each defined as in GLUE."""
        try:
            from shrp_hf.tasks.metrics import measure
        except ImportError as error:
            raise ImportError(NEEDS_METRICS.format("scikit-learn")) from error
        return measure(names, *self._compared(prediction, label_names), _average(label_names))

    def resample(
        self, predictions: Sequence[EvalPrediction], name: str, label_names: Sequence[str], num_resamples: int, seed: int
    ) -> np.ndarray:
        """As `Kind.resample`, over rows."""
        try:
            from shrp_hf.tasks.metrics import resample
        except ImportError as error:
            raise ImportError(NEEDS_METRICS.format("scikit-learn")) from error
        compared = [self._compared(prediction, label_names) for prediction in predictions]
        decided, (labels, *_) = zip(*compared, strict=True)
        return resample(name, decided, labels, _average(label_names), num_resamples, seed)

    def baseline(self, train: Dataset, rows: Dataset, names: Sequence[str], label_names: Sequence[str]) -> Baseline:
        """Judges the majority class, or the frequent labels."""
        logits = self.constant(np.asarray(train["label"]), max(1, len(label_names)))
        predictions = np.tile(logits, (len(rows), 1))
        metrics = self.judge(EvalPrediction(predictions, np.asarray(rows["label"])), names, label_names)
        what, chosen = self._constant_name(logits)
        return Baseline(f"{what} ({', '.join(label_names[index] for index in chosen)})", metrics)

    def _constant_name(self, logits: np.ndarray) -> tuple[str, Sequence[int]]:
        return "majority class", [int(logits.argmax())]

    def describe(self, train: Dataset, label_names: Sequence[str]) -> str:
        """Names the classes with their shares."""
        shares = self._shares(np.asarray(train["label"]), len(label_names))
        order = np.argsort(-shares, kind="stable")[:_MOST_SHOWN]
        more = f" and {len(label_names) - len(order)} more" if len(label_names) > len(order) else ""
        what = "classes" if self.has_classes else "labels"
        return f"{len(label_names)} {what}: " + ", ".join(f"{label_names[i]} {shares[i]:.1%}" for i in order) + more

    def _shares(self, labels: np.ndarray, count: int) -> np.ndarray:
        return np.bincount(labels.astype(int), minlength=count) / len(labels)

    def _compared(self, prediction: EvalPrediction, label_names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Returns the predicted classes or values, and the labels."""
        logits, count = prediction.predictions, max(1, len(label_names))
        logits = np.asarray(logits[0] if isinstance(logits, tuple | list) else logits)
        labels = self._shaped(np.asarray(prediction.label_ids))
        if logits.shape != (len(labels), count):
            raise ValueError(
                f"`prediction` must hold logits of shape {(len(labels), count)} for this task, got {logits.shape}. Build the "
                "model with `**task.config_kwargs`."
            )
        check_finite(logits)
        decided = self.chosen(logits)
        return decided, labels.astype(decided.dtype)

    def _shaped(self, labels: np.ndarray) -> np.ndarray:
        return labels.reshape(-1)


class Classification(LabelKind):
    """One class a row."""

    name: ClassVar[str] = "classification"
    problem_type: ClassVar[str | None] = "single_label_classification"
    metric_names: ClassVar[tuple[str, ...]] = ("accuracy", "f1")
    has_classes: ClassVar[bool] = True

    def chosen(self, logits: np.ndarray) -> np.ndarray:
        """The class with the largest logit."""
        return logits.argmax(axis=-1)

    def constant(self, labels: np.ndarray, count: int) -> np.ndarray:
        """The majority class."""
        return np.bincount(labels.astype(int), minlength=count).astype(np.float64)

    def strata(self, labels: Sequence) -> list:
        """The classes."""
        return list(labels)


class MultiLabel(LabelKind):
    """Several labels a row, or none."""

    name: ClassVar[str] = "multilabel"
    problem_type: ClassVar[str | None] = "multi_label_classification"
    metric_names: ClassVar[tuple[str, ...]] = ("f1_micro", "f1_macro")

    def chosen(self, logits: np.ndarray) -> np.ndarray:
        """1 where the sigmoid is above one half."""
        return (logits > 0).astype(np.int64)

    def constant(self, labels: np.ndarray, count: int) -> np.ndarray:
        """The labels that half of the rows have, at least the most frequent."""
        shares = labels.mean(axis=0)
        return np.where((shares >= 0.5) | (np.arange(count) == shares.argmax()), 1.0, -1.0)

    def strata(self, labels: Sequence) -> list:
        """The rarest label of each row."""
        counts = np.asarray(labels).sum(axis=0)
        rows = np.asarray(labels)
        return [int(min(np.flatnonzero(row), key=lambda label: counts[label], default=-1)) for row in rows]

    def _constant_name(self, logits: np.ndarray) -> tuple[str, Sequence[int]]:
        return "frequent labels", np.flatnonzero(logits > 0).tolist()

    def _shares(self, labels: np.ndarray, count: int) -> np.ndarray:
        return labels.mean(axis=0)

    def _shaped(self, labels: np.ndarray) -> np.ndarray:
        return labels


class Regression(LabelKind):
    """A number a row."""

    name: ClassVar[str] = "regression"
    problem_type: ClassVar[str | None] = "regression"
    metric_names: ClassVar[tuple[str, ...]] = ("pearson", "spearmanr")
    is_continuous: ClassVar[bool] = True

    def chosen(self, logits: np.ndarray) -> np.ndarray:
        """The value."""
        return logits[:, 0].astype(np.float64)

    def constant(self, labels: np.ndarray, count: int) -> np.ndarray:
        """The mean."""
        return np.full(count, labels.astype(np.float64).mean())

    def strata(self, labels: Sequence) -> list:
        """Tenths of the rows by value."""
        order = np.argsort(np.argsort(np.asarray(labels), kind="stable"), kind="stable")
        return (order * STRATA // max(1, len(labels))).tolist()

    def baseline(self, train: Dataset, rows: Dataset, names: Sequence[str], label_names: Sequence[str]) -> Baseline:
        """The mean, whose correlation is undefined."""
        mean = np.asarray(train["label"], dtype=np.float64).mean()
        return Baseline(f"mean ({mean:.4g})", dict.fromkeys(names, float("nan")))

    def describe(self, train: Dataset, label_names: Sequence[str]) -> str:
        """Gives range and mean."""
        labels = np.asarray(train["label"], dtype=np.float64)
        return f"values from {labels.min():g} to {labels.max():g}, mean {labels.mean():.4g}"


def _average(label_names: Sequence[str]) -> str:
    return "binary" if len(label_names) == 2 else "macro"


CLASSIFICATION, MULTILABEL, REGRESSION = Classification(), MultiLabel(), Regression()
TOKENS, RANKING, EMBEDDINGS = Tokens(), Ranking(), Embeddings()
LABEL_KINDS: dict[str, LabelKind] = {kind.name: kind for kind in (CLASSIFICATION, MULTILABEL, REGRESSION)}
KINDS: dict[str, Kind] = {**LABEL_KINDS, **{kind.name: kind for kind in (TOKENS, RANKING, EMBEDDINGS)}}
"""The kinds by name."""
