"""What a model's outputs mean: read from its head and its config, never from shapes, which coincide."""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional

REGRESSION = "regression"
SINGLE_LABEL = "single_label_classification"
MULTI_LABEL = "multi_label_classification"
# Heads whose logits mean one thing, whatever `problem_type` their config carries. ELECTRA's discriminator says yes or no.
_FIXED = {
    "MaskedLM": SINGLE_LABEL,
    "MultipleChoice": SINGLE_LABEL,
    "PreTraining": MULTI_LABEL,
    "QuestionAnswering": SINGLE_LABEL,
    "TokenClassification": SINGLE_LABEL,
}
_PER_TOKEN = ("MaskedLM", "PreTraining", "TokenClassification")
IGNORED = -100
"""The label of a token that is in no loss."""
JUDGED = "judged"
"""A column of tokenised rows by which an answer is judged; no input of a model."""
PAIRS, POSITIVE = "pairs", "positive_ids"
"""The split with texts that belong together, beside those of a task; in it, the column with the tokens of a text's partner."""
EMBEDDING = "sentence_embedding"
"""Field in the config of an embedding model: how its tokens become a vector, and what else its SentenceTransformer says."""
POOLING_MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens")
"""Ways to make one vector of a sentence's tokens, by the names that sentence-transformers has for them, in its order."""


def task_head(model: Any) -> str:
    """What stands behind "For" in the name of the model's class, or of the one that it inherits from; "" for a base model.

    Args:
        model: A model, also one that PEFT has wrapped.
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    found = (re.search(r"For([A-Z]\w+)$", cls.__name__) for cls in type(model).__mro__)
    return next((match[1] for match in found if match), "")


def predicts_per_token(model: Any) -> bool:
    """Whether there is one prediction for each token."""
    return task_head(model) in _PER_TOKEN


def problem_type(model: Any, labels: torch.Tensor | None = None) -> str:
    """How the model's logits are to be read: `REGRESSION`, `SINGLE_LABEL` or `MULTI_LABEL`.

    A config that does not say gets the reading of Transformers' own losses: one label is a regression, labels of floats
    are several at once.

    Args:
        model: The model.
        labels: Labels of a batch, where there are any.
    """
    fixed = _FIXED.get(task_head(model))
    if fixed:
        return fixed
    config = getattr(model, "config", None)
    stated = getattr(config, "problem_type", None)
    if stated:
        return stated
    if getattr(config, "num_labels", None) == 1:
        return REGRESSION
    return MULTI_LABEL if labels is not None and labels.is_floating_point() else SINGLE_LABEL


def embedding_of(model: Any) -> Mapping[str, Any] | None:
    """How a base model makes a vector of a sentence: `modes` (of `POOLING_MODES`, side by side), `normalize`, `similarity`.

    Args:
        model: A model; None for one with a task head, or whose config says nothing of it.
    """
    return None if task_head(model) else getattr(getattr(model, "config", None), EMBEDDING, None)


def sentence_vectors(
    embedding: Mapping[str, Any], hidden_states: torch.Tensor, attention_mask: torch.Tensor | None
) -> torch.Tensor:
    """Makes one vector of the tokens of each sentence, as its SentenceTransformer does.

    Args:
        embedding: From `embedding_of`.
        hidden_states: Shape (batch, length, hidden), padded on the right.
        attention_mask: Shape (batch, length), 1 for real tokens; None: all are.

    Returns:
        Shape (batch, hidden times modes).
    """
    if attention_mask is None:
        attention_mask = torch.ones_like(hidden_states[..., 0])
    mask = attention_mask.unsqueeze(-1).to(hidden_states.dtype)
    total, count = (hidden_states * mask).sum(dim=1), mask.sum(dim=1).clamp(min=1)
    made = {
        "cls": lambda: hidden_states[:, 0],
        "max": lambda: hidden_states.masked_fill(mask == 0, -math.inf).amax(dim=1),
        "mean": lambda: total / count,
        "mean_sqrt_len_tokens": lambda: total / count.sqrt(),
    }
    vectors = torch.cat([made[mode]() for mode in embedding["modes"]], dim=-1)
    return functional.normalize(vectors, dim=-1) if embedding["normalize"] else vectors


def vectors_of(model: Any, outputs: Mapping[str, Any], attention_mask: torch.Tensor | None) -> torch.Tensor | None:
    """The vectors of a batch of sentences, (batch, width), from the outputs of an embedding model; None of another model."""
    if isinstance(outputs, Mapping) and outputs.get(EMBEDDING) is not None:
        return outputs[EMBEDDING]  # of a teacher that was stored
    embedding = embedding_of(model)
    return None if embedding is None else sentence_vectors(embedding, outputs["last_hidden_state"], attention_mask)


def with_vectors(model: Any, outputs: Mapping[str, Any], attention_mask: torch.Tensor | None) -> Mapping[str, Any]:
    """The outputs of a model by name; of an embedding model also the vectors of its sentences (`EMBEDDING`)."""
    vectors = vectors_of(model, outputs, attention_mask)
    return outputs if vectors is None else {**outputs, EMBEDDING: vectors}


def probe_loss(vectors: torch.Tensor, seed: int) -> torch.Tensor:
    """A loss for models without labels: the mean of each sentence's vector along a direction of its own, drawn at random.

    The distance of a model to its own output is 0 with a gradient of 0, so it tells nothing of first order. Along random
    directions u the gradient tells it: for what moves the vector by d, E|u . d| = sqrt(2 / pi) |d|. So the mean of its
    absolute value over sentences is, up to that factor, the distance by which a head or neuron moves the vectors.

    Args:
        vectors: Shape (batch, width).
        seed: Seed of the directions, another one for every batch.
    """
    directions = torch.randn(vectors.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (vectors * directions.to(vectors)).sum(dim=-1).mean()


def answers_of(model: Any, outputs: Mapping[str, Any], attention_mask: torch.Tensor | None) -> list[torch.Tensor]:
    """What a model says of each row of a batch: logits, logits of each real token, or a sentence's vector; in float32.

    Vectors are as they are compared: of length 1, unless the model's similarity is the dot product.

    Args:
        model: The model.
        outputs: Its outputs.
        attention_mask: Shape (batch, length), 1 for real tokens; None: all are.

    Raises:
        ValueError: The model has no logits, and its config does not say how it makes a vector.
    """
    vectors = vectors_of(model, outputs, attention_mask)
    if vectors is not None:
        vectors = vectors if embedding_of(model)["similarity"] == "dot" else functional.normalize(vectors, dim=-1)
        return list(vectors.float().cpu())
    if outputs.get("logits") is None:
        raise ValueError(f"`{type(model).__name__}` gives {list(outputs)}, no logits: open it with the head of its task.")
    rows = outputs["logits"].float().cpu()
    if not predicts_per_token(model) or attention_mask is None:
        return list(rows)
    return [row[mask] for row, mask in zip(rows, attention_mask.cpu() == 1, strict=True)]
