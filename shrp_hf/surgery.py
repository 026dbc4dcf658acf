"""Masking heads, cutting them out, and the bridges between stock models and their Shrp classes."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init

from shrp_hf.families import FAMILIES, head_layout, refusal
from shrp_hf.models import (
    modeling_shrp_bert,
    modeling_shrp_distilbert,
    modeling_shrp_electra,
    modeling_shrp_roberta,
    modeling_shrp_vit,
)
from shrp_hf.models.head_slicing import head_columns, heads_to_keep
from shrp_hf.models.modeling_shrp import ShrpModelMixin
from shrp_hf.models.rebuilding import check_as_built, check_copyable, take_weights_
from shrp_hf.plan import KeepPlan

_SHRP_MODULES = (
    modeling_shrp_bert,
    modeling_shrp_distilbert,
    modeling_shrp_electra,
    modeling_shrp_roberta,
    modeling_shrp_vit,
)
# RoBERTa under other names: what the classes of these families begin with.
_ROBERTAS = {"xlm-roberta": "XLMRoberta", "camembert": "Camembert"}


def to_shrp(model: PreTrainedModel) -> PreTrainedModel:
    """Returns the Shrp model of a stock model, sharing its weights; a Shrp model is returned as it is.

    Raises:
        ValueError: There is no Shrp class for this model, or it is not what its class and config build: a class with a
            `forward` of its own, modules exchanged or wrapped (adapters, masks of torch, quantised), another dropout.
    """
    if isinstance(model, ShrpModelMixin):
        return model
    _check_family(model)
    name = type(model).__name__
    if model.config.model_type in _ROBERTAS:
        name = name.replace(_ROBERTAS[model.config.model_type], "Roberta")
    for module in _SHRP_MODULES:
        if hasattr(module, f"Shrp{name}"):
            return getattr(module, f"Shrp{name}").from_stock(model)
    names = {key for module in _SHRP_MODULES for key in vars(module) if key.startswith("Shrp")}
    supported = sorted(key.removeprefix("Shrp") for key in names if "For" in key or key.endswith("Model"))
    raise ValueError(f"`{type(model).__name__}` has no Shrp class; supported are {', '.join(supported)}.")


def prune_heads(model: PreTrainedModel, plan: KeepPlan | Mapping[int, list[int]]) -> PreTrainedModel:
    """Returns a new, smaller model; its outputs equal those of `model` with the other heads masked.

    Args:
        model: A stock or Shrp model; left as it is.
        plan: A `KeepPlan`, or the form of Transformers 4, `{layer: [heads to remove]}`. An empty tuple takes all heads
            of an ordinary layer: its attention then adds only the bias of its output projection.

    Raises:
        ValueError: See `to_shrp` and `ShrpModelMixin.prune_heads`.
    """
    shrp = to_shrp(model)
    check_copyable(shrp)
    pruned = copy.deepcopy(shrp)
    pruned.prune_heads(plan)
    return pruned


@contextmanager
def masked_heads(model: PreTrainedModel, plan: KeepPlan | Mapping[int, list[int]]) -> Iterator[PreTrainedModel]:
    """Silences, for as long as the context lasts, the heads that `plan` does not keep; weights are not touched.

    Args:
        model: A stock or Shrp model, pruned already or not.
        plan: As for `prune_heads`; heads are named by their index in the unpruned model.

    Yields:
        `model` itself.

    Raises:
        ValueError: The plan does not fit the model, or drops experts of an expert layer, which have no output
            projection of their own.

    Example:
        >>> with masked_heads(model, plan):  # doctest: +SKIP
        ...     quality = evaluate(model)
    """
    layout = head_layout(model)
    target = heads_to_keep(plan, layout.kept, layout.num_heads, layout.expert_layers)
    handles = []
    try:
        for i, (heads, present) in enumerate(zip(target, layout.kept, strict=True)):
            if len(heads) == len(present):
                continue
            if i in layout.expert_layers:
                raise ValueError(
                    f"`plan` drops experts of layer {i}: experts cannot be masked. Keep all of {list(present)} there, "
                    "or cut them with `prune_heads`."
                )
            mask = torch.tensor([float(head in heads) for head in present]).repeat_interleave(layout.head_size)
            handles.append(layout.output(i).register_forward_pre_hook(_Mask(mask)))
        yield model
    finally:
        for handle in handles:
            handle.remove()


class _Mask:
    """A forward pre-hook that multiplies the input of an output projection, (..., heads * head_size), by 0 and 1."""

    def __init__(self, mask: torch.Tensor) -> None:
        self.mask = mask

    def __call__(self, module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        context, *rest = inputs
        return context * self.mask.to(context), *rest


def to_stock(model: PreTrainedModel, compact: bool = False) -> PreTrainedModel:
    """Returns the stock model with the same outputs, for servers that refuse code; a stock model is returned as it is.

    It has its full size again: the heads that were cut are zero in the query, key, value and output projections, so
    there is no speed-up. A checkpoint that came as XLM-R or CamemBERT becomes one again.

    Args:
        model: A Shrp model without expert layers; left as it is.
        compact: Leave the cut heads out. Only ViT has a stock config for that (`head_dim`), and only with the same
            number of heads in every layer.

    Raises:
        ValueError: The model has expert layers, which no stock model has, it cannot be compact, or it is not what its
            class and config build.
    """
    if not isinstance(model, ShrpModelMixin):
        _check_family(model)
        return model
    config = model.config
    experts = sorted({*config.expert_layers, *config.pending_layers})
    if experts:
        raise ValueError(
            f"Layers {experts} are expert layers, which no stock model "
            "has. Ship the model as `save_pretrained` writes it: with its code."
        )
    check_as_built(model)
    kept = [config.heads_of(i) for i in range(config.num_hidden_layers)]
    if compact:
        _check_compact(model, kept)
    stock_class = _stock_class(model)
    ours = set(config.__dataclass_fields__) - set(stock_class.config_class.__dataclass_fields__)
    ours |= {"auto_map", "model_type"}
    fields = {name: value for name, value in config.to_dict().items() if name not in ours}
    if compact:
        fields |= {"num_attention_heads": len(kept[0]), "head_dim": config.head_size}
    stock_config = stock_class.config_class.from_dict(fields)
    stock_config._attn_implementation = config._attn_implementation
    options = {"add_pooling_layer": False} if getattr(model, "pooler", True) is None else {}
    with init.no_init_weights():
        stock = stock_class(stock_config, **options)
    source = copy.deepcopy(model)
    weights = dict(source.state_dict(keep_vars=True))
    if not compact:
        _add_silent_heads_(weights, stock, kept, config.head_size)
    take_weights_(stock, source, weights)
    return stock.train(model.training)


def _check_family(model: object) -> None:
    if not isinstance(model, PreTrainedModel) or model.config.model_type not in FAMILIES:
        raise ValueError(refusal(model))
    if model.config.model_type.startswith("shrp_"):
        raise ValueError(
            f"`{type(model).__name__}` came with its own code (`trust_remote_code=True`): load it again after "
            "`import shrp_hf`, without that option."
        )


def _stock_class(model: PreTrainedModel) -> type[PreTrainedModel]:
    own = next(c for c in type(model).__mro__ if c.__module__.startswith("transformers.models."))
    prefix = _ROBERTAS.get(getattr(model.config, "stock_model_type", None))
    return own if prefix is None else getattr(transformers, own.__name__.replace("Roberta", prefix))


def _check_compact(model: PreTrainedModel, kept: Sequence[Sequence[int]]) -> None:
    if model.config.model_type != "shrp_vit":
        raise ValueError(
            f"`compact=True` needs a stock config that says how wide a head is, and `{model.config.model_type}` has "
            "none: leave it False, or ship the model as `save_pretrained` writes it: with its code."
        )
    counts = [len(heads) for heads in kept]
    if len(set(counts)) > 1 or not counts[0]:
        raise ValueError(
            f"`compact=True` needs the same number of heads in every layer, at least one, but they keep {counts}: "
            "leave it False, or choose with a budget per layer."
        )


def _add_silent_heads_(
    weights: dict[str, nn.Parameter], stock: PreTrainedModel, kept: Sequence[Sequence[int]], head_size: int
) -> None:
    """Brings the projections that lost heads to the sizes that `stock` has, with zeros for the heads that are gone."""
    head_map = FAMILIES[stock.config.model_type]
    expected = stock.base_model.get_submodule(head_map.layers)
    layers = next(name for name, module in stock.named_modules() if module is expected)
    for i, heads in enumerate(kept):
        owned = head_columns(heads, head_size)
        for path in (*head_map.projections, head_map.output):
            for kind, template in expected[i].get_submodule(path).named_parameters():
                name = f"{layers}.{i}.{path}.{kind}"
                part = weights.get(name)
                if part is not None and part.shape == template.shape:
                    continue
                like = next(weights[n] for n in weights if n.startswith(f"{layers}.{i}.")) if part is None else part
                full = like.detach().new_zeros(template.shape)
                if part is not None:
                    full.index_copy_(int(path == head_map.output), owned.to(full.device), part.detach())
                weights[name] = nn.Parameter(full, requires_grad=like.requires_grad)
