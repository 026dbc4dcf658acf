"""Ranking by a cross-encoder: a score for a query and a candidate, judged by the order within a query."""

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from datasets import Dataset
from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase

from shrp_hf.models.outputs import JUDGED, MULTI_LABEL
from shrp_hf.tasks.kind import Baseline, Kind, check_finite
from shrp_hf.tasks.ranked import per_query, resampled_means


class Ranking(Kind):
    """One score for a pair of texts, learned as a probability of relevance; what counts is the order within a query.

    Rows hold `text` (the query), `text_pair` (the candidate), `label` (relevance, [0] to [1]), `query` (a number) and
    `grade` (relevance as it was given).
    """

    name: ClassVar[str] = "ranking"
    problem_type: ClassVar[str | None] = MULTI_LABEL  # of one label: binary cross-entropy, as CrossEncoder trains
    metric_names: ClassVar[tuple[str, ...]] = ("map", "mrr", "ndcg@10")

    def open(self, name: str, **fields: Any) -> tuple[PreTrainedModel, list[str]]:
        """Opens a cross-encoder, whose config seldom says that its score is a probability's logit."""
        model, untrained = super().open(name, **fields)
        if model.config.num_labels == 1 and getattr(model.config, "problem_type", None) is None:
            model.config.problem_type = self.problem_type
        return model, untrained

    def encode(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, length: int, model: Any, split: str) -> Dataset:
        """As `Kind.encode`."""
        judged = [{"query": query, "grade": grade} for query, grade in zip(rows["query"], rows["grade"], strict=True)]
        encoded = super().encode(rows.remove_columns(["query", "grade"]), tokenizer, length, model, split)
        return encoded.add_column(JUDGED, judged)

    def count(self, rows: Dataset) -> int:
        """Queries."""
        return len({*rows["query"]})

    def unit(self, rows: Dataset) -> str:
        """Queries."""
        return "queries"

    def decide(self, prediction: EvalPrediction, label_names: Sequence[str]) -> np.ndarray:
        """Returns the row of the best candidate of each query."""
        scores, best = _scores(prediction), dict[int, int]()
        for row, (judged, score) in enumerate(zip(prediction.label_ids, scores, strict=True)):
            if judged["query"] not in best or score > scores[best[judged["query"]]]:
                best[judged["query"]] = row
        return np.array(list(best.values()))

    def judge(self, prediction: EvalPrediction, names: Sequence[str], label_names: Sequence[str]) -> dict[str, float]:
        """Means over queries."""
        return {name: float(values.mean()) for name, values in _per_query(prediction, names).items()}

    def resample(
        self, predictions: Sequence[EvalPrediction], name: str, label_names: Sequence[str], num_resamples: int, seed: int
    ) -> np.ndarray:
        """As `Kind.resample`, over queries."""
        return resampled_means([_per_query(prediction, [name])[name] for prediction in predictions], num_resamples, seed)

    def baseline(self, train: Dataset, rows: Dataset, names: Sequence[str], label_names: Sequence[str]) -> Baseline:
        """Leaves the candidates in the order in which they come."""
        judged = [{"query": query, "grade": grade} for query, grade in zip(rows["query"], rows["grade"], strict=True)]
        order = -np.arange(len(rows), dtype=np.float64)[:, None]
        return Baseline("given order", self.judge(EvalPrediction(order, judged), names, label_names))

    def describe(self, train: Dataset, label_names: Sequence[str]) -> str:
        """Counts queries and candidates."""
        relevant = sum(grade > 0 for grade in train["grade"]) / len(train)
        count = self.count(train)
        return f"{count:,} queries with {len(train) / count:.1f} candidates each, of which {relevant:.1%} are relevant"


def _scores(prediction: EvalPrediction) -> np.ndarray:
    logits = prediction.predictions
    logits = np.asarray(logits[0] if isinstance(logits, tuple) else logits)
    if logits.shape != (len(prediction.label_ids), 1):
        raise ValueError(
            f"`prediction` must hold one score a row, shape {(len(prediction.label_ids), 1)}, got {logits.shape}. Build the "
            "model with `**task.config_kwargs`."
        )
    check_finite(logits)
    return logits[:, 0].astype(np.float64)


def _per_query(prediction: EvalPrediction, names: Sequence[str]) -> dict[str, np.ndarray]:
    grades: dict[int, dict[int, int]] = {}
    scores: dict[int, dict[int, float]] = {}
    for row, (judged, score) in enumerate(zip(prediction.label_ids, _scores(prediction), strict=True)):
        grades.setdefault(judged["query"], {})[row] = judged["grade"]
        scores.setdefault(judged["query"], {})[row] = score
    return per_query(names, grades, scores)
