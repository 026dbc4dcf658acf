"""`Task`: three splits, what their labels mean, and how a prediction is judged."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict
from transformers import EvalPrediction, PreTrainedTokenizerBase

from shrp_hf.defaults import MAX_LENGTH, SEED
from shrp_hf.models.lengths import fitting_length
from shrp_hf.models.outputs import PAIRS
from shrp_hf.tasks.kind import Baseline, Kind
from shrp_hf.tasks.kinds import CLASSIFICATION, KINDS, REGRESSION
from shrp_hf.tasks.sources import TASK_NAMES


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
    """One task: rows in three splits, and the kind that says how they are read, learned and judged.

    Args:
        name: Name under which it was loaded.
        train: Rows to learn from, with the columns of its kind: for those with labels `text`, `text_pair` (pair tasks only)
            and `label`.
        validation: Rows held out of the source's training set, for everything that is chosen (experts, alpha, budget,
            early stopping).
        test: The reported rows. Never choose anything on them.
        label_names: One name per output of the head; empty where there is one without a name, or none.
        metric_names: What `compute_metrics` returns of the reported rows; the first one is the headline.
        reported: Where the reported rows come from, for tables and cards.
        kind_name: Its kind, a name in `KINDS`; empty: a classification if it has `label_names`, else a regression.
        notes: What is worth saying about how its rows were read.
        pairs: Embeddings: texts that belong together (`text`, `text_pair`), on which a recovery ends; None: none.
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
    pairs: Dataset | None = None

    @property
    def kind(self) -> Kind:
        """The kind of task."""
        return KINDS[self.kind_name or (CLASSIFICATION if self.label_names else REGRESSION).name]

    @property
    def headline(self) -> str:
        """Name of the metric that stands for the task in a table."""
        return self.metric_names[0]

    @property
    def chosen_by(self) -> str:
        """Name of the metric on the held-out rows by which everything is chosen; the headline, unless the kind has another."""
        return self.kind.held_out_metric or self.headline

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
    def problem_type(self) -> str | None:
        """The value of `problem_type` in a Transformers config."""
        return self.kind.problem_type

    @property
    def config_kwargs(self) -> dict[str, Any]:
        """What `from_pretrained` needs to build a head for this task."""
        return self.kind.config_kwargs(self.label_names)

    @property
    def num_reported(self) -> int:
        """How many rows, sentences, queries or pairs the reported metrics are computed over."""
        return self.kind.count(self.test)

    def tokenize(self, tokenizer: PreTrainedTokenizerBase, max_length: int = MAX_LENGTH, model: Any = None) -> DatasetDict:
        """Turns the three splits into token ids, unpadded: a `RowCollator` pads each batch to its longest.

        Args:
            tokenizer: The model's tokenizer.
            max_length: Longest sequence in tokens, special tokens included; longer ones are truncated. More than
                the tokenizer or the model allows is clamped, and said in the log.
            model: The model that will read them, or its config; for embeddings the dense model itself, whose vectors are
                what held-out texts are judged by.

        Returns:
            The splits "train", "validation" and "test", with the tokenizer's columns, `label` where there are labels, and
            `judged` where the kind judges by more; and "pairs" where there are some.

        Raises:
            ValueError: `max_length` leaves no room for a token of text, or tokenizer or model do not suit the kind.
        """
        special = tokenizer.num_special_tokens_to_add(pair=self.is_pair)
        length = fitting_length(max_length, [] if model is None else [model], tokenizer)
        if length <= special:
            raise ValueError(f"`max_length` must exceed the {special} special tokens of a sequence, got {max_length}.")
        splits = {"train": self.train, "validation": self.validation, "test": self.test}
        if self.pairs is not None:
            splits[PAIRS] = self.pairs
        encode = self.kind.encode
        return DatasetDict({split: encode(rows, tokenizer, length, model, split) for split, rows in splits.items()})

    def compute_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """Judges predictions; for kinds with a label a row, hand it to `Trainer(compute_metrics=task.compute_metrics)`.

        Args:
            prediction: What `shrp_hf.publishing.report.predict_on` returns. For classification and regression: logits of shape
                (samples, num_labels), or a tuple that begins with them, and labels of shape (samples,), with several
                labels a row (samples, num_labels).

        Returns:
            One number per name in `metric_names`, each defined as in GLUE (0 to 1, correlations -1 to 1, NaN where one is
            undefined because the predictions are constant). F1 is that of class 1 with two classes, macro-averaged with more.

        Raises:
            ImportError: The extra `metrics` is not installed.
            ValueError: The logits do not have one column per label, or are not finite.
        """
        return self.kind.judge(prediction, self.metric_names, self.label_names)

    def decide(self, prediction: EvalPrediction) -> np.ndarray:
        """Turns predictions into decisions, by which two models are compared: classes, values, tags, best documents.

        Args:
            prediction: As for `compute_metrics`.
        """
        return self.kind.decide(prediction, self.label_names)

    @property
    def identity(self) -> dict[str, Any]:
        """What the result of a run depends on, ready for JSON; of rows that have no published name also a digest."""
        known = {"task": self.name, "train_rows": len(self.train), "reported": self.reported}
        if self.name in TASK_NAMES:
            return known
        digest = hashlib.sha256(repr(self.label_names).encode())
        for split in filter(None, (self.train, self.validation, self.test, self.pairs)):
            for row in split:
                digest.update(repr(sorted(row.items())).encode())
        return {**known, "rows": digest.hexdigest()[:16]}

    def describe(self) -> str:
        """Says in a few lines what was understood: kind, rows, classes with their shares, and how the rows were read."""
        lines = [f"{self.name}: {self.kind.name}, {self.kind.describe(self.train, self.label_names)}"]
        lines.append(
            f"{len(self.train):,} training rows, {len(self.validation):,} held out of training to choose on, "
            f"{self._counted()} to report on ({self.reported})"
        )
        return "\n  ".join((*lines, *self.notes))

    def _counted(self) -> str:
        rows, units = len(self.test), self.num_reported
        return f"{rows:,}" if rows == units else f"{units:,} {self.kind.unit(self.test)} ({rows:,} rows)"

    def bootstrap(self, predictions: Sequence[EvalPrediction], num_resamples: int = 1000, seed: int = SEED) -> np.ndarray:
        """Judges several models on rows drawn again and again with replacement, the same rows for all of them.

        Quantiles over the resamples are an interval of any metric, and those of a ratio between models are paired.
        Sentences, queries or pairs are drawn whole.

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
        return self.kind.resample(predictions, self.headline, self.label_names, num_resamples, seed)

    def baseline(self, rows: Dataset) -> Baseline:
        """Judges the answer that is best where nothing is read: the majority class, the mean, no entity, the given order.

        Args:
            rows: One of its splits.

        Raises:
            ImportError: The extra `metrics` is not installed.
        """
        return self.kind.baseline(self.train, rows, self.metric_names, self.label_names)
