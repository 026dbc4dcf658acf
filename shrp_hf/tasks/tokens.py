"""Token classification: a tag for each word by BIO, judged by entity F1 (seqeval)."""

import copy
import logging
from collections import Counter
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from datasets import Dataset
from tokenizers import pre_tokenizers
from transformers import EvalPrediction, PreTrainedTokenizerBase

from shrp_hf.models.outputs import IGNORED, JUDGED
from shrp_hf.tasks.kind import NEEDS_METRICS, Baseline, Kind, check_finite, draws

logger = logging.getLogger(__name__)

OUTSIDE = "O"
_MOST_SHOWN = 8


class Tokens(Kind):
    """A tag for each word. The first sub-word of a word carries its tag; the others, and padding, are in no loss.

    Rows hold `tokens`, words, and `label`, their tags' indices. A word without a sub-word of its own (cut off by
    `max_length`, or nothing to the tokenizer) is judged as if "O" had been said.
    """

    name: ClassVar[str] = "tokens"
    auto: ClassVar[str] = "AutoModelForTokenClassification"
    metric_names: ClassVar[tuple[str, ...]] = ("entity_f1", "entity_precision", "entity_recall")

    def encode(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, length: int, model: Any, split: str) -> Dataset:
        """As `Kind.encode`; `label` has a tag for each first sub-word and -100 elsewhere.

        Raises:
            ValueError: The tokenizer does not say which word a token is of, or does not take words.
        """
        if not tokenizer.is_fast:
            raise ValueError(
                f"The tokenizer {type(tokenizer).__name__} has no word ids, which tell the words of tokens: give the model a "
                "fast one (`AutoTokenizer.from_pretrained(..., use_fast=True)`, saved into its directory)."
            )

        tokenizer = _with_spaces(tokenizer)

        def tokens(batch: dict[str, list]) -> dict[str, list]:
            encoded = tokenizer(batch["tokens"], is_split_into_words=True, truncation=True, max_length=length)
            labels, judged = [], []
            for row, tags in enumerate(batch["label"]):
                places: list[int] = [-1] * len(tags)
                for place, word in enumerate(encoded.word_ids(row)):
                    if word is not None and places[word] < 0:
                        places[word] = place
                label = [IGNORED] * len(encoded["input_ids"][row])
                for place, tag in zip(places, tags, strict=True):
                    if place >= 0:
                        label[place] = tag
                labels.append(label)
                judged.append({"tags": tags, "places": places})
            return {**encoded, "label": labels, JUDGED: judged}

        encoded = rows.map(tokens, batched=True, remove_columns=rows.column_names, desc=f"Tokenizing {split}")
        lost = sum(place < 0 for row in encoded[JUDGED] for place in row["places"])
        if lost:
            logger.warning(
                "%s: %d words have no token within `max_length` %d: nothing is learned from them, and they count as %r.",
                split, lost, length, OUTSIDE,
            )  # fmt: skip
        return encoded

    def texts(self, rows: Dataset) -> list[str | tuple[str, ...]]:
        """The words of each row, divided by spaces."""
        return [" ".join(words) for words in rows["tokens"]]

    def unit(self, rows: Dataset) -> str:
        """Sentences."""
        return "sentences"

    def decide(self, prediction: EvalPrediction, label_names: Sequence[str]) -> np.ndarray:
        """Returns the index of each word's tag, all words of all sentences in one row."""
        return np.concatenate(self._tags(prediction, label_names))

    def judge(self, prediction: EvalPrediction, names: Sequence[str], label_names: Sequence[str]) -> dict[str, float]:
        """Micro-averaged over entities, as conlleval does: an entity is right with its type and both ends."""
        metrics = _seqeval()
        said = [[label_names[i] for i in row] for row in self._tags(prediction, label_names)]
        gold = [[label_names[i] for i in row["tags"]] for row in prediction.label_ids]
        functions = {
            "entity_f1": metrics.f1_score,
            "entity_precision": metrics.precision_score,
            "entity_recall": metrics.recall_score,
        }
        return {name: float(functions[name](gold, said, zero_division=0)) for name in names}

    def resample(
        self, predictions: Sequence[EvalPrediction], name: str, label_names: Sequence[str], num_resamples: int, seed: int
    ) -> np.ndarray:
        """As `Kind.resample`, over sentences: their entities are counted once, and added up for each draw."""
        counts = [self._counts(prediction, label_names) for prediction in predictions]  # (sentences, 3): right, said, gold
        drawn = draws(len(counts[0]), num_resamples, seed)
        total = np.array([[model[rows].sum(axis=0) for rows in drawn] for model in counts], dtype=np.float64)
        right, said, gold = np.moveaxis(total, -1, 0)
        parts = {"entity_f1": (2 * right, said + gold), "entity_precision": (right, said), "entity_recall": (right, gold)}
        above, below = parts[name]
        return np.divide(above, below, out=np.zeros_like(above), where=below > 0)

    def baseline(self, train: Dataset, rows: Dataset, names: Sequence[str], label_names: Sequence[str]) -> Baseline:
        """Says "O" of every word: no entity is found."""
        return Baseline(f"no entities ({OUTSIDE})", dict.fromkeys(names, 0.0))

    def describe(self, train: Dataset, label_names: Sequence[str]) -> str:
        """Counts words, and entities by type."""
        begins = Counter(label_names[tag][2:] for row in train["label"] for tag in row if label_names[tag].startswith("B"))
        most = begins.most_common(_MOST_SHOWN)
        more = f" and {len(begins) - len(most)} more types" if len(begins) > len(most) else ""
        found = ", ".join(f"{kind or 'entity'} {count:,}" for kind, count in most) + more
        return f"{len(label_names)} tags; {sum(map(len, train['label'])):,} words, {begins.total():,} entities: {found}"

    def _tags(self, prediction: EvalPrediction, label_names: Sequence[str]) -> list[np.ndarray]:
        """Returns the index of each word's tag, a sentence a row."""
        outside = label_names.index(OUTSIDE)
        check_finite(prediction.predictions)
        found = []
        for logits, judged in zip(prediction.predictions, prediction.label_ids, strict=True):
            if logits.ndim != 2 or logits.shape[-1] != len(label_names) or len(logits) <= max(judged["places"], default=-1):
                raise ValueError(
                    f"`prediction` must hold logits of shape (tokens, {len(label_names)}) for each sentence, got "
                    f"{logits.shape}. Build the model with `**task.config_kwargs`."
                )
            places, best = np.asarray(judged["places"]), logits.argmax(axis=-1)
            found.append(np.where(places < 0, outside, best[places]))
        return found

    def _counts(self, prediction: EvalPrediction, label_names: Sequence[str]) -> np.ndarray:
        entities = _seqeval().sequence_labeling.get_entities
        rows = []
        for said, judged in zip(self._tags(prediction, label_names), prediction.label_ids, strict=True):
            found, gold = ({*entities([label_names[i] for i in tags])} for tags in (said, judged["tags"]))
            rows.append((len(found & gold), len(found), len(gold)))
        return np.array(rows)


def _with_spaces(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Returns a tokenizer that sees a space before every word, as in running text.

    Byte-level ones (RoBERTa's, ModernBERT's) write a word after a space with other tokens than one that begins a text, and of
    words that are given one by one Transformers takes each for a beginning.
    """
    tokenizer = copy.deepcopy(tokenizer)
    whole: Any = tokenizer.backend_tokenizer.pre_tokenizer
    parts: Any = whole if isinstance(whole, pre_tokenizers.Sequence) else [whole]
    for part in parts:
        if isinstance(part, pre_tokenizers.ByteLevel):
            part.add_prefix_space = True
    return tokenizer


def _seqeval() -> Any:
    try:
        import seqeval.metrics
    except ImportError as error:
        raise ImportError(NEEDS_METRICS.format("seqeval")) from error
    return seqeval.metrics
