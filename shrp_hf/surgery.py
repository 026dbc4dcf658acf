"""Cutting heads out of a model, and the bridge from stock models to their Shrp classes."""

import copy
from collections.abc import Mapping

from transformers import PreTrainedModel

from shrp_hf.models import modeling_shrp_bert
from shrp_hf.models.modeling_shrp import ShrpModelMixin
from shrp_hf.plan import KeepPlan

_SHRP_MODULES = (modeling_shrp_bert,)


def to_shrp(model: PreTrainedModel) -> PreTrainedModel:
    """Returns the Shrp model of a stock model, sharing its weights; a Shrp model is returned as it is.

    Raises:
        ValueError: There is no Shrp class for this model.
    """
    if isinstance(model, ShrpModelMixin):
        return model
    name = f"Shrp{type(model).__name__}"
    for module in _SHRP_MODULES:
        if hasattr(module, name):
            return getattr(module, name).from_stock(model)
    supported = sorted(n.removeprefix("Shrp") for m in _SHRP_MODULES for n in vars(m) if n.startswith("Shrp"))
    raise ValueError(f"`{type(model).__name__}` has no Shrp class; supported are {', '.join(supported)}.")


def prune_heads(model: PreTrainedModel, plan: KeepPlan | Mapping[int, list[int]]) -> PreTrainedModel:
    """Returns a new, smaller model; its outputs equal those of `model` with the other heads masked.

    Args:
        model: A stock or Shrp model; left as it is.
        plan: A `KeepPlan`, or the form of Transformers 4, `{layer: [heads to remove]}`.

    Raises:
        ValueError: See `ShrpModelMixin.prune_heads`.
    """
    pruned = copy.deepcopy(to_shrp(model))
    pruned.prune_heads(plan)
    return pruned
