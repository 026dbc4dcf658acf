"""Where each supported family keeps its attention heads and FFN neurons, and which of them a model has.

Scoring, masking, cutting, counting and exporting look modules up here and nowhere else.
"""

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel

from shrp_hf.models.built import build_config, build_model, is_shrp
from shrp_hf.models.configuration_shrp import ShrpConfigFields
from shrp_hf.models.layer_map import (
    BERT_LAYER_MAP,
    DEBERTA_V2_LAYER_MAP,
    DISTILBERT_LAYER_MAP,
    MODERNBERT_LAYER_MAP,
    MPNET_LAYER_MAP,
    NOMIC_BERT_LAYER_MAP,
    VIT_LAYER_MAP,
    LayerMap,
    Part,
)
from shrp_hf.models.rebuilding import is_quantised

_FAMILIES: dict[str, LayerMap] = {
    "bert": BERT_LAYER_MAP,
    "shrp_bert": BERT_LAYER_MAP,
    "roberta": BERT_LAYER_MAP,
    "xlm-roberta": BERT_LAYER_MAP,
    "camembert": BERT_LAYER_MAP,
    "shrp_roberta": BERT_LAYER_MAP,
    "electra": BERT_LAYER_MAP,
    "shrp_electra": BERT_LAYER_MAP,
    "distilbert": DISTILBERT_LAYER_MAP,
    "shrp_distilbert": DISTILBERT_LAYER_MAP,
    "mpnet": MPNET_LAYER_MAP,
    "shrp_mpnet": MPNET_LAYER_MAP,
    "deberta-v2": DEBERTA_V2_LAYER_MAP,
    "shrp_deberta_v2": DEBERTA_V2_LAYER_MAP,
    "modernbert": MODERNBERT_LAYER_MAP,
    "shrp_modernbert": MODERNBERT_LAYER_MAP,
    "nomic_bert": NOMIC_BERT_LAYER_MAP,
    "shrp_nomic_bert": NOMIC_BERT_LAYER_MAP,
    "vit": VIT_LAYER_MAP,
    "shrp_vit": VIT_LAYER_MAP,
}
FAMILIES: Mapping[str, LayerMap] = MappingProxyType(_FAMILIES)
"""Model type (`config.model_type`) to module paths."""

REGISTERED: dict[type[PreTrainedModel], Any] = {}
"""Stock class to Shrp class, of the families that were registered from outside."""

_REASONS = {"albert": "all its layers share one set of weights, so one cut would cut every layer"}


@dataclass(frozen=True)
class HeadLayout:
    """The heads and neurons of one model and the modules that hold them.

    Args:
        layer_map: The family's module paths.
        layers: The layers, in order.
        num_heads: Heads per layer of the unpruned model.
        head_size: Width of one head.
        kept: Per layer, the original indices of the heads (experts of an expert layer) that are there, ascending.
        num_neurons: Per layer, the FFN neurons that are there; 0 in expert layers.
        expert_layers: Layers whose heads are experts, converted or about to be. An expert has no output projection of
            its own, so no post-hoc score exists for it.
        is_routed: Whether expert layers still carry a router.
    """

    layer_map: LayerMap
    layers: tuple[nn.Module, ...]
    num_heads: int
    head_size: int
    kept: tuple[tuple[int, ...], ...]
    num_neurons: tuple[int, ...]
    expert_layers: tuple[int, ...] = ()
    is_routed: bool = False

    @property
    def num_layers(self) -> int:
        """Number of layers."""
        return len(self.layers)

    @property
    def ordinary_layers(self) -> tuple[int, ...]:
        """Indices of the layers that have at least one head left and are no expert layers."""
        return tuple(layer for layer, heads in enumerate(self.kept) if heads and layer not in self.expert_layers)

    @property
    def ffn_layers(self) -> tuple[int, ...]:
        """Indices of the layers that have at least one neuron left and are no expert layers."""
        return tuple(layer for layer, count in enumerate(self.num_neurons) if count and layer not in self.expert_layers)

    def attention(self, layer: int) -> nn.Module:
        """The attention module of a layer; its forward returns (output, attention map)."""
        return self.layers[layer].get_submodule(self.layer_map.attention)

    def heads_in(self, layer: int) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
        """Weight (heads * head_size, hidden) and bias of everything that has rows per head: query, key, value first.

        Args:
            layer: Index of the layer.
        """
        return self._parts(layer, self.layer_map.heads_in)

    def output(self, layer: int) -> nn.Module:
        """The output projection of an ordinary layer; its input has shape (batch, length, heads * head_size)."""
        return self.layers[layer].get_submodule(self.layer_map.heads_out)

    def neurons_in(self, layer: int) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
        """Weight (neurons, hidden) and bias of the first FFN matrix, or of the two that share an index.

        Args:
            layer: Index of the layer.
        """
        return self._parts(layer, self.layer_map.neurons_in)

    def neurons_out(self, layer: int) -> nn.Module:
        """The second FFN matrix of an ordinary layer; its input has shape (batch, length, neurons)."""
        return self.layers[layer].get_submodule(self.layer_map.neurons_out)

    def _parts(self, layer: int, parts: Sequence[Part]) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
        owner = self.layers[layer]
        modules = [(part, owner.get_submodule(part.path)) for part in parts if part.is_in(owner)]
        return [(part.of(m.weight), None if m.bias is None else part.of(m.bias)) for part, m in modules]

    def head_parameters(self, layer: int) -> int:
        """Counts the parameters of one head: rows of query, key and value with their biases, columns of the output.

        Args:
            layer: Index of the layer.
        """
        rows = sum(weight.shape[1] + (bias is not None) for weight, bias in self.heads_in(layer))
        return self.head_size * (rows + self.output(layer).weight.shape[0])

    def neuron_parameters(self, layer: int) -> int:
        """Counts the parameters of one neuron: its rows with their biases, and its column.

        Args:
            layer: Index of the layer.
        """
        rows = sum(weight.shape[1] + (bias is not None) for weight, bias in self.neurons_in(layer))
        return rows + self.neurons_out(layer).weight.shape[0]


def head_layout(model: PreTrainedModel) -> HeadLayout:
    """Finds the heads and neurons of `model`.

    Raises:
        ValueError: The family is not supported, the model is wrapped, quantised or a decoder, or the matrices of a layer do
            not have the heads or neurons that the config states.
    """
    config = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    if model_type not in FAMILIES or not isinstance(model, PreTrainedModel):
        raise ValueError(refusal(model))
    for name in ("is_decoder", "add_cross_attention"):
        if getattr(config, name, False):
            raise ValueError(f"`{name}=True` is not supported: only encoders are. Load the model with False.")
    layer_map, num_heads = FAMILIES[model_type], config.num_attention_heads
    layers = tuple(model.base_model.get_submodule(layer_map.layers))
    kept = getattr(config, "kept_heads", None) or [range(num_heads)] * len(layers)
    expert_layers = {*getattr(config, "expert_layers", ()), *getattr(config, "pending_layers", ())}
    for i, layer in enumerate(layers):
        _check_not_quantised(i, dict(layer.named_modules()), layer_map)
    layout = HeadLayout(
        layer_map=layer_map,
        layers=layers,
        num_heads=num_heads,
        head_size=_head_size(config),
        kept=tuple(tuple(heads) for heads in kept),
        num_neurons=tuple(0 if i in expert_layers else _width(layer, layer_map) for i, layer in enumerate(layers)),
        expert_layers=tuple(sorted(expert_layers)),
        is_routed=bool(expert_layers) and config.routed,
    )
    _check_widths(layout)
    return layout


def _check_not_quantised(index: int, modules: Mapping[str, nn.Module], layer_map: LayerMap) -> None:
    paths = (*layer_map.head_paths, *layer_map.neuron_paths)
    if any(is_quantised(modules[path]) for path in paths if path in modules):
        raise ValueError(f"Layer {index} is quantised: score and prune the model as it was before, then quantise it.")


def _width(layer: nn.Module, layer_map: LayerMap) -> int:
    weight = getattr(layer.get_submodule(layer_map.neurons_out), "weight", None)
    return 0 if weight is None else weight.shape[1]


def _check_widths(layout: HeadLayout) -> None:
    for layer in layout.ordinary_layers:
        expected = len(layout.kept[layer]) * layout.head_size
        widths = [weight.shape[0] for weight, _ in layout.heads_in(layer)]
        widths.append(layout.output(layer).weight.shape[1])
        if set(widths) != {expected}:
            raise ValueError(
                f"Layer {layer} has projections of width {widths} (query, key, value, output), but its "
                f"{len(layout.kept[layer])} heads of size {layout.head_size} need {expected}: heads were cut without "
                "a record of which. Cut them with `shrp_hf.prune_heads`, which keeps that record in the config."
            )
    for layer in layout.ffn_layers:
        rows, columns = [weight.shape[0] for weight, _ in layout.neurons_in(layer)], layout.num_neurons[layer]
        if set(rows) != {columns}:
            raise ValueError(
                f"Layer {layer} has {rows} rows in its first FFN matrix and {columns} columns in its second, but both count "
                "its neurons: cut them with `shrp_hf.prune_heads`, or correct the layer map."
            )


def refusal(model: object) -> str:
    """Says why `model` has no layer map, and the way out."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type in FAMILIES:
        return (
            f"`model` must be a Transformers model, got {type(model).__name__} around one. Unwrap it first "
            "(PEFT: `model.merge_and_unload()`; DistributedDataParallel: `model.module`)."
        )
    known = ", ".join(sorted(name for name in FAMILIES if not name.startswith("shrp_")))
    reason = f" ({_REASONS[model_type]})" if model_type in _REASONS else ""
    return (
        f"`model` is of type {model_type!r}, and no layer map says where its heads and neurons are{reason}. Supported: "
        f"{known}. Teach shrp_hf another family by `shrp_hf.register_family({model_type!r}, LayerMap(...))`; see "
        "docs/how-to/add-a-family.md."
    )


def register_family(
    model_type: str,
    layer_map: LayerMap,
    config_class: type[PreTrainedConfig] | None = None,
    model_classes: Sequence[type[PreTrainedModel]] | None = None,
) -> dict[str, type[PreTrainedModel]]:
    """Teaches scoring, masking, cutting, saving, loading and `to_stock` a family that the package does not know.

    Call it once per process, also before loading what was saved. It does not convert to expert layers (SHRP).

    Args:
        model_type: The family's `config.model_type`.
        layer_map: Where a layer keeps its heads and neurons.
        config_class: Its config class, or a Shrp config of your own; None: the one that `AutoConfig` knows.
        model_classes: Its model classes, the base model first, or Shrp classes of your own; None: those that the Auto
            classes know.

    Returns:
        The Shrp classes by name; the Auto classes know them from now on.

    Raises:
        ValueError: The family is registered already, or unknown to Transformers and not given; a path of the map is not
            there, or a matrix cannot be divided into heads or neurons as it says. Nothing is registered then.

    Example:
        >>> register_family("ernie", BERT_LAYER_MAP)["ShrpErnieModel"]  # doctest: +SKIP
    """
    if not isinstance(layer_map, LayerMap):
        raise ValueError(f"`layer_map` must be a LayerMap, got {layer_map!r}.")
    if model_type in FAMILIES:
        raise ValueError(f"The family {model_type!r} is registered already: call `register_family` once per process.")
    config, classes = _classes_of(model_type, config_class, model_classes)
    is_own = issubclass(config, ShrpConfigFields)
    if is_own and config.layer_map != layer_map:
        raise ValueError(f"`{config.__name__}.layer_map` must be the `layer_map` that is registered, got another.")
    shrp_config = config if is_own else build_config(config, layer_map)
    _check_map(model_type, layer_map, classes[0])
    built: dict[type[PreTrainedModel], Any] = {}
    for stock in classes:
        base = next(iter(built.values()), None)
        built[stock] = stock if is_shrp(stock) else build_model(stock, shrp_config, base)
    _FAMILIES[model_type] = _FAMILIES[shrp_config.model_type] = layer_map
    REGISTERED.update({_stock_of(stock): shrp for stock, shrp in built.items()})
    AutoConfig.register(shrp_config.model_type, shrp_config)
    for auto, shrp in _auto_classes(built.values()):
        auto.register(shrp_config, shrp, exist_ok=True)
    return {shrp.__name__: shrp for shrp in built.values()}


def _classes_of(
    model_type: str, config_class: Any, model_classes: Sequence[type[PreTrainedModel]] | None
) -> tuple[Any, list[type[PreTrainedModel]]]:
    """Returns config and models of a family, those given or else those that the Auto classes know."""
    config = config_class
    if config is None and model_classes and is_shrp(model_classes[0]):
        config = model_classes[0].config_class
    elif config is None:
        if model_type not in CONFIG_MAPPING:
            raise ValueError(f"`AutoConfig` knows no family {model_type!r}: give `config_class` and `model_classes`.")
        config = CONFIG_MAPPING[model_type]
    classes = list(model_classes) if model_classes is not None else _known_classes(config)
    if not classes:
        raise ValueError(f"The Auto classes know no model of the family {model_type!r}: give `model_classes`.")
    found = {str(getattr(each.config_class, "model_type", None)) for each in classes} | {config.model_type}
    if not found <= {model_type, f"shrp_{model_type}"}:
        raise ValueError(f"`config_class` and `model_classes` must be of the family {model_type!r}, got {sorted(found)}.")
    return config, classes


def _known_classes(config_class: type[PreTrainedConfig]) -> list[type[PreTrainedModel]]:
    """Returns the models of a config that the Auto classes know, the base model first."""
    autos = [getattr(transformers, name) for name in dir(transformers) if name.startswith("AutoModelFor")]
    found: list[type[PreTrainedModel]] = []
    for auto in (transformers.AutoModel, *autos):
        mapping = getattr(auto, "_model_mapping", None)
        known = mapping[config_class] if mapping is not None and config_class in mapping else ()
        found += [each for each in (known if isinstance(known, tuple) else (known,)) if each not in found]
    return found


def _auto_classes(classes: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    for i, each in enumerate(classes):
        _, has_head, head = each.__name__.rpartition("For")
        name = f"AutoModelFor{head}" if has_head and i else "AutoModel"
        if hasattr(transformers, name):
            yield getattr(transformers, name), each


def _stock_of(model_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
    return next(each for each in model_class.__mro__ if issubclass(each, PreTrainedModel) and not is_shrp(each))


def _check_map(model_type: str, layer_map: LayerMap, base_class: type[PreTrainedModel]) -> None:
    """Looks every path of a map up in a base model without weights.

    Raises:
        ValueError: Names the field, what it says and what there is.
    """
    config, base = _without_weights(base_class)
    layers = _module(model_type, "layers", base, layer_map.layers)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        raise ValueError(
            f"`layers` of the layer map of {model_type!r} must name a ModuleList, but {layer_map.layers!r} is a "
            f"{type(layers).__name__}."
        )
    layer = layers[-1]  # the first one of some families lacks a norm
    attention = _module(model_type, "attention", layer, layer_map.attention)
    for name, owner in (("head_count", attention), ("head_width", attention), ("activation", layer)):
        attribute = getattr(layer_map, name)
        if attribute is not None and not _has(owner, attribute):
            raise ValueError(
                f"`{name}` of the layer map of {model_type!r} names {attribute!r}, but {type(owner).__name__} has no such "
                "attribute: give the right one, or None."
            )
    if layer_map.head_bias is not None and layer_map.head_bias not in inspect.signature(attention.forward).parameters:
        raise ValueError(
            f"`head_bias` of the layer map of {model_type!r} names {layer_map.head_bias!r}, but the forward of "
            f"{type(attention).__name__} has no such argument."
        )
    if layer_map.norm_before is not None:
        _module(model_type, "norm_before", layer, layer_map.norm_before)
    inside = {name: getattr(layer_map, name) for name in ("after_heads", "position_modules")}
    for name, paths in (inside | {"residual_norm": (layer_map.residual_norm,)}).items():
        for path in filter(None, paths):
            _module(model_type, name, layer, path)
            if not path.startswith(f"{layer_map.attention}."):
                raise ValueError(
                    f"`{name}` of the layer map of {model_type!r} names {path!r}, which is not inside its `attention` "
                    f"{layer_map.attention!r}."
                )
    head_width = config.num_attention_heads * _head_size(config)
    _check_matrices(model_type, layer_map, layer, "heads", head_width)
    _check_matrices(model_type, layer_map, layer, "neurons", getattr(config, layer_map.ffn_width, None))


def _check_matrices(model_type: str, layer_map: LayerMap, layer: nn.Module, kind: str, width: int | None) -> None:
    if width is None:
        raise ValueError(
            f"`ffn_width` of the layer map of {model_type!r} names {layer_map.ffn_width!r}, but the config has no such field."
        )
    parts, output = getattr(layer_map, f"{kind}_in"), getattr(layer_map, f"{kind}_out")
    least = 3 if kind == "heads" else 1
    if len(parts) < least:
        raise ValueError(f"`{kind}_in` of the layer map of {model_type!r} must name {least} part(s) at least, got {parts!r}.")
    for part in parts:
        if part.optional and not part.is_in(layer):
            continue
        weight = _weight(model_type, f"{kind}_in", layer, part.path)
        if len(weight) != width * part.blocks:
            raise ValueError(
                f"`{kind}_in` of the layer map of {model_type!r} says {part.blocks} block(s) of {width} rows for "
                f"{part.path!r}, but it has {len(weight)} rows."
            )
    columns = _weight(model_type, f"{kind}_out", layer, output).shape[1]
    if columns != width:
        raise ValueError(
            f"`{kind}_out` of the layer map of {model_type!r} needs {width} columns in {output!r}, but it has {columns}."
        )


def _without_weights(base_class: type[PreTrainedModel]) -> tuple[PreTrainedConfig, nn.Module]:
    config = base_class.config_class()
    try:
        with torch.device("meta"):
            return config, base_class(config).base_model
    except (TypeError, ValueError) as error:  # such as a size that its config leaves open
        raise ValueError(
            f"`{base_class.__name__}` cannot be built from the default values of `{type(config).__name__}`, which the map is "
            f"checked on: {error}. Give the config defaults that say all, or `config_class` and `model_classes` of your own."
        ) from error


def _weight(model_type: str, field: str, layer: nn.Module, path: str) -> torch.Tensor:
    module = _module(model_type, field, layer, path)
    weight = getattr(module, "weight", None)
    if weight is None or weight.dim() != 2:
        raise ValueError(
            f"`{field}` of the layer map of {model_type!r} names {path!r}, which is a {type(module).__name__} and no matrix."
        )
    return weight


def _has(owner: object, path: str) -> bool:
    for name in path.split("."):
        if not hasattr(owner, name):
            return False
        owner = getattr(owner, name)
    return True


def _module(model_type: str, field: str, parent: nn.Module, path: str) -> Any:
    try:
        return parent.get_submodule(path)
    except AttributeError as error:
        raise ValueError(
            f"`{field}` of the layer map of {model_type!r} names {path!r}, but {type(parent).__name__} has no such module: "
            f"it has {', '.join(name for name, _ in parent.named_modules() if name)[:300]}."
        ) from error


def _head_size(config: PreTrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
