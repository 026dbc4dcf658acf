"""Where each supported family keeps its attention heads, and which heads a model has.

Scoring, masking and cutting look modules up here and nowhere else. A family qualifies when every layer has separate
query, key and value projections whose rows lie head by head, and an output projection that reads the heads side by
side.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from torch import nn
from transformers import PreTrainedModel

from shrp_hf.models.head_slicing import BERT_HEAD_MAP, DISTILBERT_HEAD_MAP, VIT_HEAD_MAP, HeadMap
from shrp_hf.models.rebuilding import is_quantised

FAMILIES: Mapping[str, HeadMap] = MappingProxyType(
    {
        "bert": BERT_HEAD_MAP,
        "shrp_bert": BERT_HEAD_MAP,
        "roberta": BERT_HEAD_MAP,
        "xlm-roberta": BERT_HEAD_MAP,
        "camembert": BERT_HEAD_MAP,
        "shrp_roberta": BERT_HEAD_MAP,
        "electra": BERT_HEAD_MAP,
        "shrp_electra": BERT_HEAD_MAP,
        "distilbert": DISTILBERT_HEAD_MAP,
        "shrp_distilbert": DISTILBERT_HEAD_MAP,
        "vit": VIT_HEAD_MAP,
        "shrp_vit": VIT_HEAD_MAP,
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
    """The heads of one model and the modules that hold them.

    Args:
        head_map: The family's module paths.
        layers: The layers, in order.
        num_heads: Heads per layer of the unpruned model.
        head_size: Width of one head.
        kept: Per layer, the original indices of the heads (experts of an expert layer) that are there, ascending.
        expert_layers: Layers whose heads are experts, converted or about to be. An expert has no output projection of
            its own, so no post-hoc score exists for it.
        is_routed: Whether expert layers still carry a router.
    """

    head_map: HeadMap
    layers: tuple[nn.Module, ...]
    num_heads: int
    head_size: int
    kept: tuple[tuple[int, ...], ...]
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

    def attention(self, layer: int) -> nn.Module:
        """The attention module of a layer; its forward returns (output, attention map)."""
        return self.layers[layer].get_submodule(self.head_map.attention)

    def projections(self, layer: int) -> tuple[nn.Module, ...]:
        """Query, key and value projection of an ordinary layer: weights (heads * head_size, hidden)."""
        return tuple(self.layers[layer].get_submodule(path) for path in self.head_map.projections)

    def output(self, layer: int) -> nn.Module:
        """The output projection of an ordinary layer; its input has shape (batch, length, heads * head_size)."""
        return self.layers[layer].get_submodule(self.head_map.output)

    def head_parameters(self, layer: int) -> int:
        """Counts the parameters of one head: rows of query, key and value with their biases, columns of the output.

        Args:
            layer: Index of the layer.
        """
        rows = sum(module.weight.shape[1] + (module.bias is not None) for module in self.projections(layer))
        return self.head_size * (rows + self.output(layer).weight.shape[0])


def head_layout(model: PreTrainedModel) -> HeadLayout:
    """Finds the heads of `model`.

    Raises:
        ValueError: The family is not supported, the model is wrapped, quantised or a decoder, or the projections of a
            layer do not have the number of heads that the config states.
    """
    config = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    if model_type not in FAMILIES or not isinstance(model, PreTrainedModel):
        raise ValueError(refusal(model))
    for name in ("is_decoder", "add_cross_attention"):
        if getattr(config, name, False):
            raise ValueError(f"`{name}=True` is not supported: only encoders are. Load the model with False.")
    head_map, num_heads = FAMILIES[model_type], config.num_attention_heads
    layers = tuple(model.base_model.get_submodule(head_map.layers))
    kept = getattr(config, "kept_heads", None) or [range(num_heads)] * len(layers)
    expert_layers = {*getattr(config, "expert_layers", ()), *getattr(config, "pending_layers", ())}
    layout = HeadLayout(
        head_map=head_map,
        layers=layers,
        num_heads=num_heads,
        head_size=getattr(config, "head_dim", None) or config.hidden_size // num_heads,
        kept=tuple(tuple(heads) for heads in kept),
        expert_layers=tuple(sorted(expert_layers)),
        is_routed=bool(expert_layers) and config.routed,
    )
    _check_widths(layout)
    return layout


def _check_widths(layout: HeadLayout) -> None:
    for layer in layout.ordinary_layers:
        expected = len(layout.kept[layer]) * layout.head_size
        if any(map(is_quantised, (*layout.projections(layer), layout.output(layer)))):
            raise ValueError(f"Layer {layer} is quantised: score and prune the model as it was before, then quantise it.")
        widths = [module.weight.shape[0] for module in layout.projections(layer)]
        widths.append(layout.output(layer).weight.shape[1])
        if widths != [expected] * 4:
            raise ValueError(
                f"Layer {layer} has projections of width {widths} (query, key, value, output), but its "
                f"{len(layout.kept[layer])} heads of size {layout.head_size} need {expected}: heads were cut without "
                "a record of which. Cut them with `shrp_hf.prune_heads`, which keeps that record in the config."
            )


def refusal(model: object) -> str:
    """Says why `model` has no head map, and the way out."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type in FAMILIES:
        return (
            f"`model` must be a Transformers model, got {type(model).__name__} around one. Unwrap it first "
            "(PEFT: `model.merge_and_unload()`; DistributedDataParallel: `model.module`)."
        )
    known = ", ".join(sorted(name for name in FAMILIES if not name.startswith("shrp_")))
    reason = f" ({_REASONS[model_type]})" if model_type in _REASONS else ""
    return (
        f"`model` is of type {model_type!r}, and no head map says where its heads are{reason}. Supported: {known}. "
        "A family with separate query, key and value projections can be added: a `HeadMap` in "
        "`shrp_hf.models.head_slicing`, a row in `shrp_hf.families.FAMILIES` and, to cut and save, a config and a "
        "modeling file in `shrp_hf.models`; see docs/how-to/add-a-family.md."
    )
