"""Masking heads and neurons, cutting them out, and the bridges between stock models and their Shrp classes."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init

from shrp_hf.families import FAMILIES, REGISTERED, HeadLayout, head_layout, refusal
from shrp_hf.models import (
    modeling_shrp_bert,
    modeling_shrp_debertav2,
    modeling_shrp_distilbert,
    modeling_shrp_electra,
    modeling_shrp_modernbert,
    modeling_shrp_mpnet,
    modeling_shrp_nomicbert,
    modeling_shrp_roberta,
    modeling_shrp_vit,
)
from shrp_hf.models.layer_map import row_index
from shrp_hf.models.modeling_shrp import ShrpModelMixin
from shrp_hf.models.rebuilding import check_as_built, check_copyable, pooler_options, take_weights_
from shrp_hf.models.slicing import OutputMeans, head_columns, heads_to_keep, neurons_to_keep
from shrp_hf.plans.keep_plan import KeepPlan

_SHRP_MODULES = (
    modeling_shrp_bert,
    modeling_shrp_debertav2,
    modeling_shrp_distilbert,
    modeling_shrp_electra,
    modeling_shrp_modernbert,
    modeling_shrp_mpnet,
    modeling_shrp_nomicbert,
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
    if type(model) in REGISTERED:
        return REGISTERED[type(model)].from_stock(model)
    name = type(model).__name__
    if model.config.model_type in _ROBERTAS:
        name = name.replace(_ROBERTAS[model.config.model_type], "Roberta")
    for module in _SHRP_MODULES:
        if hasattr(module, f"Shrp{name}"):
            return getattr(module, f"Shrp{name}").from_stock(model)
    if model.config.model_type in {stock.config_class.model_type for stock in REGISTERED}:
        raise ValueError(
            f"`{name}` has no Shrp class: give it in `register_family({model.config.model_type!r}, ..., model_classes=[...])`."
        )
    names = {key for module in _SHRP_MODULES for key in vars(module) if key.startswith("Shrp")}
    supported = sorted(key.removeprefix("Shrp") for key in names if "For" in key or key.endswith("Model"))
    raise ValueError(f"`{type(model).__name__}` has no Shrp class; supported are {', '.join(supported)}.")


def prune_heads(
    model: PreTrainedModel, plan: KeepPlan | Mapping[int, list[int]], output_means: OutputMeans | None = None
) -> PreTrainedModel:
    """Returns a new, smaller model; its outputs equal those of `model` with the other heads and neurons masked.

    Args:
        model: A stock or Shrp model; left as it is.
        plan: A `KeepPlan`, or the form of Transformers 4, `{layer: [heads to remove]}`. An empty tuple takes all heads, or
            all neurons, of an ordinary layer: what is left of them is the bias of their output matrix.
        output_means: What scoring collected of this model (`HeadStats.output_means`): what is cut leaves its mean
            contribution in the output bias. None: it leaves nothing.

    Raises:
        ValueError: See `to_shrp` and `ShrpModelMixin.prune_heads`.
    """
    shrp = to_shrp(model)
    check_copyable(shrp)
    pruned = copy.deepcopy(shrp)
    pruned.prune_heads(plan, output_means)
    return pruned


@contextmanager
def masked_heads(
    model: PreTrainedModel, plan: KeepPlan | Mapping[int, list[int]], output_means: OutputMeans | None = None
) -> Iterator[PreTrainedModel]:
    """Silences, for as long as the context lasts, the heads and neurons that `plan` does not keep; weights are not touched.

    Args:
        model: A stock or Shrp model, pruned already or not.
        plan: As for `prune_heads`; heads are named by their index in the unpruned model.
        output_means: As for `prune_heads`: what is silenced puts out its mean. None: it puts out 0.

    Yields:
        `model` itself.

    Raises:
        ValueError: The plan or the means do not fit the model, or the plan drops experts of an expert layer, which have no
            output projection of their own.

    Example:
        >>> with masked_heads(model, plan):  # doctest: +SKIP
        ...     quality = evaluate(model)
    """
    layout = head_layout(model)
    masks = _masks(layout, plan, output_means)
    handles = []
    try:
        for module, mask in masks:
            handles.append(module.register_forward_pre_hook(mask))
        yield model
    finally:
        for handle in handles:
            handle.remove()


def _masks(
    layout: HeadLayout, plan: KeepPlan | Mapping[int, list[int]], output_means: OutputMeans | None
) -> list[tuple[nn.Module, "_Mask"]]:
    """Returns the output matrices of which something is silenced, each with its mask."""
    target = heads_to_keep(plan, layout.kept, layout.num_heads, layout.expert_layers)
    neurons = neurons_to_keep(plan, layout.num_neurons, layout.expert_layers)
    masks = []
    for i, (heads, present) in enumerate(zip(target, layout.kept, strict=True)):
        if i in layout.expert_layers:
            if len(heads) < len(present):
                raise ValueError(
                    f"`plan` drops experts of layer {i}: experts cannot be masked. Keep all of {list(present)} there, "
                    "or cut them with `prune_heads`."
                )
            continue
        means: tuple = (None, None)
        if output_means is not None:
            means = output_means.of_layer(i, (len(present), layout.head_size), layout.num_neurons[i])
        if len(heads) < len(present):
            kept = [float(head in heads) for head in present]
            mask = torch.tensor(kept).repeat_interleave(layout.head_size)
            masks.append((layout.output(i), _Mask(mask, None if means[0] is None else means[0].flatten())))
        if neurons is not None and len(neurons[i]) < layout.num_neurons[i]:
            mask = torch.zeros(layout.num_neurons[i])
            mask[neurons[i]] = 1
            masks.append((layout.neurons_out(i), _Mask(mask, means[1])))
    return masks


class _Mask:
    """A forward pre-hook that sets columns of the input of an output matrix, (..., columns), to 0 or to their mean.

    Args:
        mask: 1 for what stays, shape (columns,).
        means: What the others become, shape (columns,); None: 0.
    """

    def __init__(self, mask: torch.Tensor, means: torch.Tensor | None) -> None:
        self.mask = mask
        self.means = None if means is None else means.to(mask.device) * (1 - mask)

    def __call__(self, module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        values, *rest = inputs
        masked = values * self.mask.to(values)
        return (masked if self.means is None else masked + self.means.to(values)), *rest


def to_stock(model: PreTrainedModel, compact: bool = False) -> PreTrainedModel:
    """Returns the stock model with the same outputs, for servers that refuse code; a stock model is returned as it is.

    It has its full size again: the heads and neurons that were cut are zero in the matrices that had them, so there is no
    speed-up. A checkpoint that came as XLM-R or CamemBERT becomes one again.

    Args:
        model: A Shrp model without expert layers; left as it is.
        compact: Leave out what was cut. A stock config can say so of neurons where all layers have as many, and of heads
            in ViT alone (`head_dim`), again where all layers have as many.

    Raises:
        ValueError: The model has expert layers or output biases, which no stock model of its family has, it cannot be
            compact, or it is not what its class and config build.
    """
    if not isinstance(model, ShrpModelMixin):
        _check_family(model)
        return model
    config = model.config
    _check_has_stock_form(model)
    kept = [config.heads_of(i) for i in range(config.num_hidden_layers)]
    widths = [config.num_neurons_of(i) for i in range(config.num_hidden_layers)]
    if compact:
        _check_compact(model, kept, widths)
    stock_class = _stock_class(model)
    ours = set(config.__dataclass_fields__) - set(stock_class.config_class.__dataclass_fields__)
    ours |= {"auto_map", "model_type"}
    fields = {name: value for name, value in config.to_dict().items() if name not in ours}
    if compact:
        fields |= {config.layer_map.ffn_width: widths[0]}
        if len(kept[0]) < config.num_attention_heads:
            fields |= {"num_attention_heads": len(kept[0]), "head_dim": config.head_size}
    stock_config = stock_class.config_class.from_dict(fields)
    stock_config._attn_implementation = config._attn_implementation
    with init.no_init_weights():
        stock = stock_class(stock_config, **pooler_options(model, stock_class))
    source = copy.deepcopy(model)
    weights = dict(source.state_dict(keep_vars=True))
    if not compact:
        _add_silent_rows_(weights, stock, kept, config)
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
    own = next(c for c in type(model).__mro__ if issubclass(c, PreTrainedModel) and not issubclass(c, ShrpModelMixin))
    prefix = _ROBERTAS.get(getattr(model.config, "stock_model_type", None))
    return own if prefix is None else getattr(transformers, own.__name__.replace("Roberta", prefix))


def _check_has_stock_form(model: PreTrainedModel) -> None:
    config = model.config
    experts = sorted({*config.expert_layers, *config.pending_layers})
    if experts:
        raise ValueError(
            f"Layers {experts} are expert layers, which no stock model "
            "has. Ship the model as `save_pretrained` writes it: with its code."
        )
    check_as_built(model, extended=type(model) if type(model) in REGISTERED.values() else None)
    if config.output_bias:
        raise ValueError(
            f"`{type(model).__name__}` was cut with `output_means`, which left a bias in output matrices that have none in "
            "the stock class. Cut without them, or ship the model as `save_pretrained` writes it: with its code."
        )


def _check_compact(model: PreTrainedModel, kept: Sequence[Sequence[int]], widths: Sequence[int]) -> None:
    config, counts = model.config, [len(heads) for heads in kept]
    if config.model_type != "shrp_vit" and any(count < config.num_attention_heads for count in counts):
        raise ValueError(
            f"`compact=True` needs a stock config that says how wide a head is, and `{config.model_type}` has "
            "none: leave it False, or ship the model as `save_pretrained` writes it: with its code."
        )
    for kind, found in (("heads", counts), ("neurons", widths)):
        if len(set(found)) > 1 or not found[0]:
            raise ValueError(
                f"`compact=True` needs the same number of {kind} in every layer, at least one, but they keep {found}: "
                "leave it False, or choose with a budget per layer."
            )


def _add_silent_rows_(
    weights: dict[str, nn.Parameter], stock: PreTrainedModel, kept: Sequence[Sequence[int]], config: PreTrainedConfig
) -> None:
    """Brings matrices that lost heads or neurons to the sizes that `stock` has, with zeros for what is gone.

    Which neurons are gone no longer matters to what the model says: those that are left come first.
    """
    layer_map = FAMILIES[stock.config.model_type]
    expected = stock.base_model.get_submodule(layer_map.layers)
    layers = next(name for name, module in stock.named_modules() if module is expected)
    for i, heads in enumerate(kept):
        columns = head_columns(heads, config.head_size)
        neurons = torch.arange(config.num_neurons_of(i))
        owned = [(path, layer_map.heads_in, layer_map.heads_out, columns) for path in layer_map.head_paths]
        owned += [(path, layer_map.neurons_in, layer_map.neurons_out, neurons) for path in layer_map.neuron_paths]
        for path, parts, output, index in owned:
            if not all(part.is_in(expected[i]) for part in parts if part.path == path):
                continue
            for kind, template in expected[i].get_submodule(path).named_parameters():
                name = f"{layers}.{i}.{path}.{kind}"
                part = weights.get(name)
                if part is not None and part.shape == template.shape:
                    continue
                like = next(weights[n] for n in weights if n.startswith(f"{layers}.{i}.")) if part is None else part
                full = like.detach().new_zeros(template.shape)
                if part is not None:
                    where = index if path == output else row_index(parts, path, len(template), index)
                    full.index_copy_(int(path == output), where.to(full.device), part.detach())
                weights[name] = nn.Parameter(full, requires_grad=like.requires_grad)
