"""`Kind`: what every kind of task says of itself, and all that the commands ask of it."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import transformers
from datasets import Dataset
from transformers import EvalPrediction, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from shrp_hf.checkpoints import open_model

NEEDS_METRICS = "Computing metrics needs {}: pip install 'shrp_hf[metrics]'"
_SHORTEST = 3  # letters of an abbreviation, as in NEG for negative


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


class Kind(ABC):
    """One kind of task: its rows, the head that learns it, its metrics, and the answer that reads nothing.

    What a model is taught follows from its head (`shrp_hf.models.outputs`); how rows are read and which are refused stands in
    the loader of the kind (`shrp_hf.tasks.loading`). Nothing else tells kinds apart.

    Attributes:
        name: What `--task` calls it.
        auto: Name of the Auto class that opens its models.
        problem_type: The value of `problem_type` in a Transformers config; None where its head has one meaning.
        metric_names: What it is judged by, the headline first.
        held_out_metric: What candidates are chosen by, where held-out rows are judged by another metric; empty: the headline.
        has_classes: Whether a row has one class, which selectors that tell classes apart need.
        is_continuous: Whether an answer is a number, equal to another where it is close.
        is_tuned: Whether there are labels to fine-tune a dense model on.
    """

    name: ClassVar[str]
    auto: ClassVar[str] = "AutoModelForSequenceClassification"
    problem_type: ClassVar[str | None] = None
    metric_names: ClassVar[tuple[str, ...]]
    held_out_metric: ClassVar[str] = ""
    has_classes: ClassVar[bool] = False
    is_continuous: ClassVar[bool] = False
    is_tuned: ClassVar[bool] = True

    def open(self, name: str, **fields: Any) -> tuple[PreTrainedModel, list[str]]:
        """Opens a model of this kind, as `open_model` does.

        Args:
            name: Hub id or directory.
            **fields: Fields of the config to change.
        """
        return open_model(name, getattr(transformers, self.auto), **fields)

    def config_kwargs(self, label_names: Sequence[str]) -> dict[str, Any]:
        """Returns what `from_pretrained` needs to build a head.

        Args:
            label_names: One name per output; empty where there is one without a name.
        """
        names = dict(enumerate(label_names or ("score",)))
        stated = {} if self.problem_type is None else {"problem_type": self.problem_type}
        return {
            "num_labels": len(names),
            **stated,
            "id2label": names,
            "label2id": {name: index for index, name in names.items()},
        }

    def check_model(self, name: str, config: PreTrainedConfig, label_names: Sequence[str], task: str) -> None:
        """Refuses a model whose outputs do not mean what the labels of a task mean.

        Args:
            name: What to call it.
            config: Its config.
            label_names: The task's labels.
            task: Name of the task.

        Raises:
            ValueError: It has another head, predicts another number or kind of labels, or a label that both know has another
                number.
        """
        own = self.auto.removeprefix("AutoModelFor")
        others = {head for cls in config.architectures or () if (head := cls.partition("For")[2]) and head != own}
        if others:
            raise ValueError(
                f"`{name}` was saved with the head {others.pop()}, but the task {task!r} ({self.name}) needs {own}: give a "
                "model that was fine-tuned on it."
            )
        count = max(1, len(label_names))
        if config.num_labels != count:
            raise ValueError(
                f"`{name}` predicts {config.num_labels} labels, but the task {task!r} has {count}: give a model that was "
                "fine-tuned on it."
            )
        stated = getattr(config, "problem_type", None)
        if stated is not None and self.problem_type is not None and stated != self.problem_type:
            raise ValueError(
                f"`{name}` was fine-tuned for {stated!r} (`problem_type`), but the task {task!r} is {self.problem_type!r}: "
                "give a model that was fine-tuned on it."
            )
        theirs = [_plain(config.id2label[i]) for i in range(config.num_labels)]
        ours = [_plain(label) for label in label_names]
        if any(_find(label, ours) not in (None, i) for i, label in enumerate(theirs)):
            raise ValueError(
                f"`{name}` numbers its labels {theirs}, but the task {task!r} numbers them {ours}: every prediction would be "
                "taken for another. Reorder the rows of its classifier, or fine-tune it on this task."
            )

    def encode(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, length: int, model: Any, split: str) -> Dataset:
        """Turns rows into token ids, unpadded, with `label` and, where other things judge an answer, `judged`.

        Args:
            rows: Of the task: `text`, perhaps `text_pair`, and `label`.
            tokenizer: The model's tokenizer.
            length: Most tokens of a row, special tokens included.
            model: The model that will read them; None or a config will do for kinds whose labels are in the rows.
            split: "train", "validation" or "test".
        """

        def tokens(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
            return tokenizer(batch["text"], batch.get("text_pair"), truncation=True, max_length=length)

        texts = [column for column in rows.column_names if column != "label"]
        return rows.map(tokens, batched=True, remove_columns=texts, desc=f"Tokenizing {split}")

    def texts(self, rows: Dataset) -> list[str | tuple[str, ...]]:
        """Returns what the rows read: a text each, or a pair."""
        parts = [rows[name] for name in ("text", "text_pair") if name in rows.column_names]
        return [row if len(row) > 1 else row[0] for row in zip(*parts, strict=True)]

    def count(self, rows: Dataset) -> int:
        """Returns how many units (`unit`) a metric over `rows` is computed over.

        Args:
            rows: Of the task.
        """
        return len(rows)

    def unit(self, rows: Dataset) -> str:
        """Returns what is counted, in the plural.

        Args:
            rows: Of the task.
        """
        return "rows"

    @abstractmethod
    def decide(self, prediction: EvalPrediction, label_names: Sequence[str]) -> np.ndarray:
        """Turns a model's answers into decisions, one a row or more, by which two models are compared.

        Args:
            prediction: From `shrp_hf.publishing.report.predict_on`.
            label_names: The task's labels.

        Raises:
            ValueError: The answers are not of this task, or not finite.
        """

    @abstractmethod
    def judge(self, prediction: EvalPrediction, names: Sequence[str], label_names: Sequence[str]) -> dict[str, float]:
        """Computes metrics.

        Args:
            prediction: From `shrp_hf.publishing.report.predict_on`.
            names: Metrics; rows that are judged by others (`held_out_metric`) give those.
            label_names: The task's labels.

        Raises:
            ImportError: The extra `metrics` is not installed.
            ValueError: As `decide`.
        """

    @abstractmethod
    def resample(
        self, predictions: Sequence[EvalPrediction], name: str, label_names: Sequence[str], num_resamples: int, seed: int
    ) -> np.ndarray:
        """Computes one metric of several models on units drawn with replacement, the same ones for all of them.

        Args:
            predictions: One a model, over the same rows.
            name: The metric.
            label_names: The task's labels.
            num_resamples: How often units are drawn.
            seed: Seed of the draws.

        Returns:
            Shape (models, num_resamples).
        """

    @abstractmethod
    def baseline(self, train: Dataset, rows: Dataset, names: Sequence[str], label_names: Sequence[str]) -> Baseline:
        """Judges the best answer that reads nothing.

        Args:
            train: What it learns from.
            rows: What it is judged on.
            names: Metrics.
            label_names: The task's labels.
        """

    @abstractmethod
    def describe(self, train: Dataset, label_names: Sequence[str]) -> str:
        """Says in a phrase what the training rows hold.

        Args:
            train: The training rows.
            label_names: The task's labels.
        """


def draws(count: int, num_resamples: int, seed: int) -> list[np.ndarray]:
    """Draws `count` of `count` units with replacement, again and again: indices, one array a resample."""
    generator = np.random.default_rng(seed)
    return [generator.integers(count, size=count) for _ in range(num_resamples)]


def check_finite(answers: Sequence[np.ndarray] | np.ndarray) -> None:
    """Refuses answers of which one is not finite: of NaN, argmax would make the first class.

    Raises:
        ValueError: Names the first row.
    """
    rows = [row for row, answer in enumerate(answers) if not np.isfinite(answer).all()]
    if rows:
        raise ValueError(
            f"`prediction` holds logits that are not finite, first in row {rows[0]} ({len(rows)} of {len(answers)}): a weight "
            "is damaged, or half precision overflows: load another checkpoint, or evaluate in float32."
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
