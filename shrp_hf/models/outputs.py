"""What a model's outputs mean: read from its head and its config, never from shapes, which coincide."""

import re
from typing import Any

import torch

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
