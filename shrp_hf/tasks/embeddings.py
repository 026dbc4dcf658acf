"""Embeddings: texts without labels, a vector for each, followed to where the dense model's own vector is."""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from datasets import Dataset
from transformers import EvalPrediction, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from shrp_hf.models.outputs import EMBEDDING, JUDGED, PAIRS, POSITIVE, answers_of, embedding_of
from shrp_hf.tasks.kind import NEEDS_METRICS, Baseline, Kind, check_finite, draws
from shrp_hf.tasks.ranked import MEASURES, per_query, resampled_means
from shrp_hf.tasks.sentence_folder import plain_embedding, read_sentence_folder

logger = logging.getLogger(__name__)

SIMILARITY_METRICS = ("spearmanr", "pearson")
RETRIEVAL_METRICS = ("ndcg@10", "recall@100", "mrr@10")
AGREEMENT_METRICS = ("agreement", "cosine")
NEIGHBOURS = 10  # held-out texts that each one is compared with
DEPTH = 100  # documents that are retrieved for a query
_BATCH_SIZE = 64
_PROMPTS = {"query": ("query",), "document": ("document", "passage", "corpus")}


class Embeddings(Kind):
    """A vector for each text; the dense model's own is all that is learned, and distances to it are what heads matter by.

    Rows hold `text`; those that judgements are about also `role` ("query" or "document", which choose a prompt; "" for none)
    and `judged`: `pair` and `score` (how similar two texts are), or `relevant` and `grades` (of a query: rows of
    documents; of a document: None). Others are judged by the dense model: `agreement`, Spearman's correlation between the
    similarities of texts under both, and `cosine`, the mean between the two vectors of a text.
    """

    name: ClassVar[str] = "embeddings"
    auto: ClassVar[str] = "AutoModel"
    metric_names: ClassVar[tuple[str, ...]] = AGREEMENT_METRICS
    held_out_metric: ClassVar[str] = AGREEMENT_METRICS[0]
    is_continuous: ClassVar[bool] = True
    is_tuned: ClassVar[bool] = False

    def open(self, name: str, **fields: Any) -> tuple[PreTrainedModel, list[str]]:
        """Opens the encoder of a SentenceTransformer; its config learns how its vectors are made.

        Raises:
            ValueError: See `open_model` and `read_sentence_folder`.
        """
        embedding = read_sentence_folder(name)
        model, untrained = super().open(name, **fields)
        if untrained and all(key.startswith("pooler.") for key in untrained):
            model.pooler, untrained = None, []
        if embedding is None and embedding_of(model) is None:
            embedding = plain_embedding()
            logger.warning("`%s` has no modules.json: its vectors are taken to be the mean of its tokens.", name)
        if embedding is not None:
            setattr(model.config, EMBEDDING, embedding)
        return model, untrained

    def config_kwargs(self, label_names: Sequence[str]) -> dict[str, Any]:
        """Nothing: there is no head."""
        return {}

    def check_model(self, name: str, config: PreTrainedConfig, label_names: Sequence[str], task: str) -> None:
        """Every encoder will do."""

    def encode(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, length: int, model: Any, split: str) -> Dataset:
        """As `Kind.encode`; texts that nobody judged are, outside of training, embedded by `model`.

        Raises:
            ValueError: `model` is no embedding model.
        """
        embedding = embedding_of(model)
        if embedding is None:
            raise ValueError("`model` must be the embedding model, as `load_fine_tuned` opens it: it judges held-out texts.")

        def tokens(batch: dict[str, list]) -> dict[str, list]:
            roles = batch.get("role") or [""] * len(batch["text"])
            texts = [prompt_of(embedding, role) + text for role, text in zip(roles, batch["text"], strict=True)]
            return tokenizer(texts, truncation=True, max_length=length)

        if split == PAIRS:
            return self._encode_pairs(rows, tokenizer, length, embedding)
        names = [column for column in rows.column_names if column != JUDGED]
        encoded = rows.map(tokens, batched=True, remove_columns=names, desc=f"Tokenizing {split}")
        if split == "train" or JUDGED in encoded.column_names:
            return encoded
        return encoded.add_column(JUDGED, [{"vector": vector.tolist()} for vector in _embedded(model, encoded, tokenizer)])

    def _encode_pairs(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, length: int, embedding: Mapping) -> Dataset:
        """The tokens of each text as a query, and of its partner as a document."""
        columns = {}
        for name, column, role in (("input_ids", "text", "query"), (POSITIVE, "text_pair", "document")):
            texts = [prompt_of(embedding, role) + text for text in rows[column]]
            columns[name] = tokenizer(texts, truncation=True, max_length=length)["input_ids"]
        return Dataset.from_dict(columns)

    def count(self, rows: Dataset) -> int:
        """Pairs, queries, or texts."""
        return len(rows) if JUDGED not in rows.column_names else len(_units(rows[JUDGED]))

    def unit(self, rows: Dataset) -> str:
        """Pairs, queries, or texts."""
        if JUDGED not in rows.column_names:
            return "texts"
        return "pairs" if "score" in rows[0][JUDGED] else "queries"

    def decide(self, prediction: EvalPrediction, label_names: Sequence[str]) -> np.ndarray:
        """Returns the best document of each query, the similarity of each pair, or those of held-out texts."""
        vectors, judged = _checked(prediction)
        if "relevant" in judged[0]:
            documents, queries = _sides(judged)
            return documents[(vectors[queries] @ vectors[documents].T).argmax(axis=1)]
        if "score" in judged[0]:
            return _similarities(vectors, judged)[0]
        return _neighbours(vectors).mean(axis=1)

    def judge(self, prediction: EvalPrediction, names: Sequence[str], label_names: Sequence[str]) -> dict[str, float]:
        """By the judgements of people where there are any, else by the dense model."""
        vectors, judged = _checked(prediction)
        if "relevant" in judged[0]:
            wanted = [name for name in names if name in MEASURES]
            return {name: float(values.mean()) for name, values in _retrieved(vectors, judged, wanted).items()}
        if "score" in judged[0]:
            return _measured([name for name in names if name in SIMILARITY_METRICS], *_similarities(vectors, judged))
        own = _own(judged)
        agreement = _measured(["spearmanr"], *(_neighbours(side).ravel() for side in (vectors, own)))["spearmanr"]
        return {"agreement": agreement, "cosine": float((vectors * own).sum(axis=1).mean())}

    def resample(
        self, predictions: Sequence[EvalPrediction], name: str, label_names: Sequence[str], num_resamples: int, seed: int
    ) -> np.ndarray:
        """As `Kind.resample`, over queries, pairs or texts."""
        checked = [_checked(prediction) for prediction in predictions]
        judged = checked[0][1]
        if "relevant" in judged[0]:
            return resampled_means([_retrieved(*both, [name])[name] for both in checked], num_resamples, seed)
        if "score" in judged[0]:
            sides = [_similarities(*both) for both in checked]
        else:
            own = _neighbours(_own(judged))
            name, sides = "spearmanr", [(_neighbours(vectors), own) for vectors, _ in checked]
        drawn = draws(len(sides[0][0]), num_resamples, seed)
        return np.array(
            [[_measured([name], ours[rows].ravel(), theirs[rows].ravel())[name] for rows in drawn] for ours, theirs in sides]
        )

    def baseline(self, train: Dataset, rows: Dataset, names: Sequence[str], label_names: Sequence[str]) -> Baseline:
        """Gives all texts one vector, of which every metric is undefined."""
        names = names if JUDGED in rows.column_names else AGREEMENT_METRICS
        return Baseline("one vector for all texts", dict.fromkeys(names, math.nan))

    def describe(self, train: Dataset, label_names: Sequence[str]) -> str:
        """Says that there are no labels."""
        return "vectors of texts, which the dense model's own teach"


def prompt_of(embedding: Mapping[str, Any], role: str) -> str:
    """The prompt that stands before a text: that of its role where the model has one, else the model's default.

    Args:
        embedding: From `embedding_of`.
        role: "query", "document", or "" for neither.
    """
    prompts = embedding["prompts"]
    names = [*_PROMPTS.get(role, ()), embedding["default_prompt_name"]]
    return next((prompts[name] for name in names if prompts.get(name)), "")


def _embedded(model: PreTrainedModel, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> list[np.ndarray]:
    """The vectors of tokenised rows, in their order."""
    vectors: list[np.ndarray] = [np.empty(0)] * len(rows)
    order = sorted(range(len(rows)), key=lambda row: -len(rows[row]["input_ids"]))
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        for start in range(0, len(order), _BATCH_SIZE):
            chosen = order[start : start + _BATCH_SIZE]
            batch = tokenizer.pad([rows[row] for row in chosen], return_tensors="pt").to(model.device)
            for row, vector in zip(chosen, answers_of(model, model(**batch), batch["attention_mask"]), strict=True):
                vectors[row] = vector.numpy()
    model.train(was_training)
    return vectors


def _checked(prediction: EvalPrediction) -> tuple[np.ndarray, Sequence[Mapping[str, Any]]]:
    vectors, judged = prediction.predictions, prediction.label_ids
    vectors = np.asarray(vectors[0] if isinstance(vectors, tuple) else vectors, dtype=np.float64)
    if vectors.ndim != 2 or len(vectors) != len(judged):
        raise ValueError(f"`prediction` must hold a vector for each of {len(judged)} texts, got the shape {vectors.shape}.")
    check_finite(vectors)
    return vectors, judged


def _own(judged: Sequence[Mapping[str, Any]]) -> np.ndarray:
    return np.array([row["vector"] for row in judged], dtype=np.float64)


def _neighbours(vectors: np.ndarray) -> np.ndarray:
    """Similarities of each text with the next ones, (texts, neighbours)."""
    count = min(NEIGHBOURS, len(vectors) - 1)
    return np.stack([(vectors * np.roll(vectors, -step, axis=0)).sum(axis=1) for step in range(1, count + 1)], axis=1)


def _similarities(vectors: np.ndarray, judged: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Similarity of each pair, and what people said of it."""
    sides: dict[int, list[int]] = {}
    for row, found in enumerate(judged):
        sides.setdefault(found["pair"], []).append(row)
    first, second = np.array(list(sides.values())).T
    return (vectors[first] * vectors[second]).sum(axis=1), np.array([judged[row]["score"] for row in first])


def _sides(judged: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Rows of documents, and of queries."""
    is_query = np.array([row["relevant"] is not None for row in judged])
    return np.flatnonzero(~is_query), np.flatnonzero(is_query)


def _units(judged: Sequence[Mapping[str, Any]]) -> Sequence[Any]:
    return list({row["pair"] for row in judged}) if "score" in judged[0] else _sides(judged)[1].tolist()


def _retrieved(vectors: np.ndarray, judged: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, np.ndarray]:
    """Metrics of each query, from the best documents that the vectors find."""
    documents, queries = _sides(judged)
    grades, scores = {}, {}
    for query in queries.tolist():
        found = vectors[documents] @ vectors[query]
        best = np.argpartition(-found, min(DEPTH, len(found)) - 1)[:DEPTH]
        grades[query] = dict(zip(judged[query]["relevant"], judged[query]["grades"], strict=True))
        scores[query] = dict(zip(documents[best].tolist(), found[best].tolist(), strict=True))
    return per_query(names, grades, scores)


def _measured(names: Sequence[str], ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
    try:
        from shrp_hf.tasks.metrics import measure
    except ImportError as error:
        raise ImportError(NEEDS_METRICS.format("scikit-learn")) from error
    return measure(names, ours, theirs)
