"""`Task`: three splits, what their labels mean, and how a prediction is judged."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict
from transformers import EvalPrediction, PreTrainedTokenizerBase

from shrp_hf.defaults import MAX_LENGTH
from shrp_hf.models.lengths import fitting_length
from shrp_hf.tasks.kinds import CLASSIFICATION, KINDS, MULTILABEL, REGRESSION, Kind
from shrp_hf.tasks.sources import TASK_NAMES

_MOST_SHOWN = 8  # classes that are named
_NEEDS_METRICS = "Computing metrics needs scikit-learn: pip install 'shrp_hf[metrics]'"


def shown(value: float | None, form: str = ".4f") -> str:
    """Prints a metric, or that it is undefined: a correlation is, where all predictions are one number.

    Args:
        value: The metric, or a ratio of two; NaN or None where it is undefined.
        form: Format of a number.
    """
    return "undefined: constant predictions" if value is None or math.isnan(value) else format(value, form)


def for_json(value: Any) -> Any:
    """Returns what JSON can hold: None for numbers that are not finite, also inside of mappings and lists."""
    if isinstance(value, Mapping):
        return {name: for_json(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [for_json(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True, eq=False)
class Task:
    """One task on texts: classification, with one label a row or several, or regression.

    Args:
        name: Name under which it was loaded.
        train: Rows to learn from. Columns `text`, `text_pair` (pair tasks only), `label`.
        validation: Rows held out of the source's training set, for everything that is chosen (experts, alpha, budget,
            early stopping).
        test: The reported rows. Never choose anything on them.
        label_names: One name per class; empty for regression.
        metric_names: What `compute_metrics` returns; the first one is the headline.
        reported: Where the reported rows come from, for tables and cards.
        kind_name: Its kind, a name in `KINDS`; empty: a classification if it has `label_names`, else a regression.
        notes: What is worth saying about how its rows were read.
    """

    name: str
    train: Dataset
    validation: Dataset
    test: Dataset
    label_names: tuple[str, ...]
    metric_names: tuple[str, ...]
    reported: str
    kind_name: str = ""
    notes: tuple[str, ...] = ()

    @property
    def kind(self) -> Kind:
        """The kind of task."""
        return KINDS[self.kind_name or (CLASSIFICATION if self.label_names else REGRESSION).name]

    @property
    def headline(self) -> str:
        """Name of the metric that stands for the task in a table."""
        return self.metric_names[0]

    @property
    def is_pair(self) -> bool:
        """Whether a row holds two texts."""
        return "text_pair" in self.train.column_names

    @property
    def is_regression(self) -> bool:
        """Whether labels are numbers rather than classes."""
        return self.kind is REGRESSION

    @property
    def num_labels(self) -> int:
        """Size of the model's output: the number of classes, 1 for regression."""
        return max(1, len(self.label_names))

    @property
    def problem_type(self) -> str:
        """The value of `problem_type` in a Transformers config."""
        return self.kind.problem_type

    @property
    def config_kwargs(self) -> dict[str, Any]:
        """What `from_pretrained` needs to build a head for this task."""
        names = dict(enumerate(self.label_names or ("score",)))
        label2id = {name: index for index, name in names.items()}
        return {
            "num_labels": self.num_labels,
            "problem_type": self.problem_type,
            "id2label": names,
            "label2id": label2id,
        }

    def tokenize(self, tokenizer: PreTrainedTokenizerBase, max_length: int = MAX_LENGTH, model: Any = None) -> DatasetDict:
        """Turns the three splits into token ids, unpadded: a `DataCollatorWithPadding` pads each batch to its longest.

        Args:
            tokenizer: The model's tokenizer.
            max_length: Longest sequence in tokens, special tokens included; longer ones are truncated. More than
                the tokenizer or the model allows is clamped, and said in the log.
            model: The model that will read them, or its config.

        Returns:
            The splits "train", "validation" and "test", with the tokenizer's columns and `label`.

        Raises:
            ValueError: `max_length` leaves no room for a token of text.
        """
        special = tokenizer.num_special_tokens_to_add(pair=self.is_pair)
        length = fitting_length(max_length, [] if model is None else [model], tokenizer)
        if length <= special:
            raise ValueError(f"`max_length` must exceed the {special} special tokens of a sequence, got {max_length}.")

        def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
            return tokenizer(batch["text"], batch.get("text_pair"), truncation=True, max_length=length)

        texts = [column for column in self.train.column_names if column != "label"]
        splits = DatasetDict(train=self.train, validation=self.validation, test=self.test)
        return splits.map(encode, batched=True, remove_columns=texts, desc=f"Tokenizing {self.name}")

    def compute_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """Judges predictions; hand it to `Trainer(compute_metrics=task.compute_metrics)`.

        Args:
            prediction: Logits of shape (samples, num_labels), or a tuple that begins with them, and labels of shape
                (samples,), with several labels a row (samples, num_labels).

        Returns:
            One number per name in `metric_names`, each defined as in GLUE (0 to 1, correlations -1 to 1, NaN where one is
            undefined because the predictions are constant). F1 is that of class 1 with two classes, macro-averaged with more.

        Raises:
            ImportError: The extra `metrics` is not installed.
            ValueError: The logits do not have one column per label, or are not finite.
        """
        try:
            from shrp_hf.tasks.metrics import measure
        except ImportError as error:
            raise ImportError(_NEEDS_METRICS) from error
        return measure(self.metric_names, *self._decisions(prediction), self._average)

    @property
    def identity(self) -> dict[str, Any]:
        """What the result of a run depends on, ready for JSON; of rows that have no published name also a digest."""
        known = {"task": self.name, "train_rows": len(self.train), "reported": self.reported}
        if self.name in TASK_NAMES:
            return known
        digest = hashlib.sha256(repr(self.label_names).encode())
        for split in (self.train, self.validation, self.test):
            for row in split:
                digest.update(repr(sorted(row.items())).encode())
        return {**known, "rows": digest.hexdigest()[:16]}

    def describe(self) -> str:
        """Says in a few lines what was understood: kind, rows, classes with their shares, and how the rows were read."""
        lines = [f"{self.name}: {self.kind.name}, {self._labels()}"]
        lines.append(
            f"{len(self.train):,} training rows, {len(self.validation):,} held out of training to choose on, "
            f"{len(self.test):,} to report on ({self.reported})"
        )
        return "\n  ".join((*lines, *self.notes))

    def _labels(self) -> str:
        labels = np.asarray(self.train["label"], dtype=np.float64)
        if self.is_regression:
            return f"values from {labels.min():g} to {labels.max():g}, mean {labels.mean():.4g}"
        shares = labels.mean(axis=0) if self.kind is MULTILABEL else np.bincount(labels.astype(int), minlength=self.num_labels)
        shares = shares if self.kind is MULTILABEL else shares / len(labels)
        order = np.argsort(-shares, kind="stable")[:_MOST_SHOWN]
        more = f" and {self.num_labels - len(order)} more" if self.num_labels > len(order) else ""
        what = "labels" if self.kind is MULTILABEL else "classes"
        return f"{self.num_labels} {what}: " + ", ".join(f"{self.label_names[i]} {shares[i]:.1%}" for i in order) + more

    def bootstrap(self, predictions: Sequence[EvalPrediction], num_resamples: int = 1000, seed: int = 0) -> np.ndarray:
        """Judges several models on rows drawn again and again with replacement, the same rows for all of them.

        Quantiles over the resamples are an interval of any metric, and those of a ratio between models are paired.

        Args:
            predictions: One a model, as for `compute_metrics`, over the same rows.
            num_resamples: How often the rows are drawn.
            seed: Seed of the draws.

        Returns:
            The headline metric, shape (models, num_resamples).

        Raises:
            ImportError: The extra `metrics` is not installed.
            ValueError: The logits do not have one column per label.
        """
        try:
            from shrp_hf.tasks.metrics import resample
        except ImportError as error:
            raise ImportError(_NEEDS_METRICS) from error
        decided, (labels, *_) = zip(*map(self._decisions, predictions), strict=True)
        return resample(self.headline, decided, labels, self._average, num_resamples, seed)

    @property
    def _average(self) -> str:
        return "binary" if self.num_labels == 2 else "macro"

    def _decisions(self, prediction: EvalPrediction) -> tuple[np.ndarray, np.ndarray]:
        """Returns the predicted classes or values, and the labels."""
        logits = prediction.predictions
        logits = np.asarray(logits[0] if isinstance(logits, tuple | list) else logits)
        labels = np.asarray(prediction.label_ids)
        labels = labels if self.kind is MULTILABEL else labels.reshape(-1)
        if logits.shape != (len(labels), self.num_labels):
            raise ValueError(
                f"`prediction` must hold logits of shape {(len(labels), self.num_labels)} for task {self.name!r}, "
                f"got {logits.shape}. Build the model with `**task.config_kwargs`."
            )
        if not np.isfinite(logits).all():  # of NaN, argmax would make the first class
            rows = np.flatnonzero(~np.isfinite(logits).all(axis=1))
            raise ValueError(
                f"`prediction` holds logits that are not finite, first in row {rows[0]} ({len(rows)} of {len(logits)}): a "
                "weight is damaged, or half precision overflows: load another checkpoint, or evaluate in float32."
            )
        decided = self.kind.decide(logits)
        return decided, labels.astype(decided.dtype)
