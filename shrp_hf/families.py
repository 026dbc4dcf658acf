"""Where each supported family keeps its attention heads and FFN neurons, and which of them a model has.

Scoring, masking, cutting, counting and exporting look modules up here and nowhere else.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import nn
from transformers import PreTrainedModel

from shrp_hf.models.layer_map import BERT_LAYER_MAP, DISTILBERT_LAYER_MAP, VIT_LAYER_MAP, LayerMap, Part

FAMILIES: Mapping[str, LayerMap] = MappingProxyType(
    {
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
        "vit": VIT_LAYER_MAP,
        "shrp_vit": VIT_LAYER_MAP,
    }
)
"""Model type (`config.model_type`) to module paths."""

_REASONS = {
    "deberta-v2": "its attention modules also hold relative-position projections per head",
    "mpnet": "all its layers share one position bias sized for all heads",
    "albert": "all its layers share one set of heads, so one cut would cut every layer",
    "modernbert": "its query, key and value are fused in one projection",
}


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
        """Weight (heads * head_size, hidden) and bias of everything that has rows per head: query, key, value first."""
        return self._parts(layer, self.layer_map.heads_in)

    def output(self, layer: int) -> nn.Module:
        """The output projection of an ordinary layer; its input has shape (batch, length, heads * head_size)."""
        return self.layers[layer].get_submodule(self.layer_map.heads_out)

    def neurons_in(self, layer: int) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
        """Weight (neurons, hidden) and bias of the first FFN matrix, or of the two that share an index."""
        return self._parts(layer, self.layer_map.neurons_in)

    def neurons_out(self, layer: int) -> nn.Module:
        """The second FFN matrix of an ordinary layer; its input has shape (batch, length, neurons)."""
        return self.layers[layer].get_submodule(self.layer_map.neurons_out)

    def _parts(self, layer: int, parts: Sequence[Part]) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
        modules = [(part, self.layers[layer].get_submodule(part.path)) for part in parts]
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
        ValueError: The family is not supported, the model is wrapped or a decoder, or the matrices of a layer do not
            have the heads or neurons that the config states.
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
    layout = HeadLayout(
        layer_map=layer_map,
        layers=layers,
        num_heads=num_heads,
        head_size=getattr(config, "head_dim", None) or config.hidden_size // num_heads,
        kept=tuple(tuple(heads) for heads in kept),
        num_neurons=tuple(0 if i in expert_layers else _width(layer, layer_map) for i, layer in enumerate(layers)),
        expert_layers=tuple(sorted(expert_layers)),
        is_routed=bool(expert_layers) and config.routed,
    )
    _check_widths(layout)
    return layout


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
