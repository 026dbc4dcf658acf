"""The form in which a model is traced: few and large operators, ONNX Runtime's own or standard ones alone."""

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from shrp_hf.families import HeadLayout, head_layout
from shrp_hf.models.expert_layer import ExpertLayer
from shrp_hf.models.outputs import EMBEDDING, with_vectors

OPSET = 20  # the first one with Gelu
OPSETS = range(18, 24)  # what torch writes and the tests read
ATTENTION = "shrp_onnx"
PORTABLE_ATTENTION = "shrp_onnx_portable"
OUTPUTS = ("logits", "start_logits", "end_logits", EMBEDDING, "last_hidden_state", "pooler_output")
_MASKED = float(torch.finfo(torch.float32).min)
_Projections = Sequence[tuple[torch.Tensor, torch.Tensor | None]]


@dataclass(frozen=True)
class Form:
    """How a graph is written.

    Args:
        operators: "fused": with ONNX Runtime's own operators, which nothing else reads. "portable": standard ones alone.
        split: Of fused attention: project in a product of its own, which int8 can quantise at any width. Else ONNX
            Runtime's `Attention` does everything.
        opset: Version of the standard operators.
    """

    operators: str = "fused"
    split: bool = False
    opset: int = OPSET

    @property
    def is_portable(self) -> bool:
        """Whether only standard operators are used."""
        return self.operators == "portable"


class FusedAttention(nn.Module):
    """Query, key and value projection in one product, and attention in one operator of ONNX Runtime; traced, never run.

    Args:
        projections: Weight (heads * head_size, hidden) and bias, or None, of query, key and value.
        head_size: Width of one head.
        split: See `Form`.
    """

    def __init__(self, projections: _Projections, head_size: int, split: bool) -> None:
        super().__init__()
        self.width = projections[0][0].shape[0]
        self.num_heads = self.width // head_size
        self.split = split
        self.weight = nn.Parameter(torch.cat([w.detach() for w, _ in projections]).T.contiguous())  # (hidden, 3 * width)
        biases = [weight.new_zeros(self.width) if bias is None else bias.detach() for weight, bias in projections]
        self.bias = nn.Parameter(torch.cat(biases))

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: object
    ) -> tuple[torch.Tensor, None]:
        """Maps (batch, length, hidden) and a mask (batch, length), int32, to (batch, length, heads * head_size)."""
        attributes = {"num_heads": self.num_heads, "mask_filter_value": _MASKED}
        if self.split:
            parts = (hidden_states @ self.weight).split(self.width, dim=-1)
            name, inputs = "MultiHeadAttention", (*parts, self.bias, attention_mask)
        else:
            name, inputs = "Attention", (hidden_states, self.weight, self.bias, attention_mask)
            attributes["qkv_hidden_sizes"] = [self.width] * 3
        shape = (*hidden_states.shape[:-1], self.width)
        context = torch.onnx.ops.symbolic(
            f"com.microsoft::{name}", inputs, attributes, dtype=hidden_states.dtype, shape=shape, version=1
        )
        return context, None


class PortableAttention(nn.Module):
    """The same of standard operators: one product, then what attention is made of.

    Args:
        projections: Weight (heads * head_size, hidden) and bias, or None, of query, key and value.
        head_size: Width of one head.
    """

    def __init__(self, projections: _Projections, head_size: int) -> None:
        super().__init__()
        whole = FusedAttention(projections, head_size, split=True)
        self.width, self.num_heads = whole.width, whole.num_heads
        # Scores are scaled where they cost nothing.
        scale = whole.bias.new_ones(3 * self.width)
        scale[: self.width] = head_size**-0.5
        self.weight, self.bias = nn.Parameter(whole.weight.detach() * scale), nn.Parameter(whole.bias.detach() * scale)

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: object
    ) -> tuple[torch.Tensor, None]:
        """Maps (batch, length, hidden) and a bias (batch, 1, 1, length) to (batch, length, heads * head_size)."""
        projected = hidden_states @ self.weight + self.bias
        parts = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in projected.split(self.width, dim=-1))
        query, key, value = parts  # (batch, heads, length, head_size)
        scores = query @ key.transpose(-1, -2)
        scores = scores if attention_mask is None else scores + attention_mask
        return (scores.softmax(dim=-1) @ value).transpose(1, 2).flatten(2), None


class ProjectedAttention(nn.Module):
    """Either, in families that keep the output projection inside the attention module."""

    def __init__(self, attention: nn.Module, output: nn.Module) -> None:
        super().__init__()
        self.attention, self.output = attention, output

    def forward(self, hidden_states: torch.Tensor, *args: torch.Tensor | None, **kwargs: object) -> tuple[torch.Tensor, None]:
        """Maps (batch, length, hidden) and the mask to (batch, length, hidden)."""
        context, weights = self.attention(hidden_states, *args, **kwargs)
        return self.output(context), weights


class FusedExpertLayer(nn.Module):
    """A static expert layer: attention, expander and residual. The mean over experts goes into the expander's weight."""

    def __init__(self, layer: ExpertLayer, layout: HeadLayout, index: int, form: Form) -> None:
        super().__init__()
        self.attention = _attention(layout.heads_in(index), layout.head_size, form)
        norm = layout.layer_map.norm_before
        self.norm = nn.Identity() if norm is None else layer.get_submodule(norm)
        self.expander = layer.expander
        count, dense = self.attention.num_heads, layer.expander.dense
        dense.weight = nn.Parameter(dense.weight.detach().repeat(1, count) / count)

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, *args: object, **kwargs: object
    ) -> torch.Tensor:
        """Maps (batch, length, hidden) to the same shape."""
        heads, _ = self.attention(self.norm(hidden_states), attention_mask)
        return hidden_states + self.expander(heads)


class _Traced(nn.Module):
    """Takes the inputs in order; returns the outputs in order, then what goes into each of `layers` and out of the last."""

    def __init__(
        self,
        model: PreTrainedModel,
        input_names: Sequence[str],
        output_names: Sequence[str],
        layers: Sequence[nn.Module] = (),
    ) -> None:
        super().__init__()
        self.model, self.input_names, self.output_names = model, input_names, output_names
        self.layers = tuple(layers)  # no ModuleList: they are modules of the model already

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        states: list[torch.Tensor] = []
        handles = [layer.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0])) for layer in self.layers]
        for layer in self.layers[-1:]:
            handles.append(layer.register_forward_hook(lambda _, inputs, output: states.append(_first(output))))
        inputs = dict(zip(self.input_names, tensors, strict=True))
        output = with_vectors(self.model, self.model(**inputs, return_dict=True), inputs.get("attention_mask"))
        for handle in handles:
            handle.remove()
        return (*(output[name] for name in self.output_names), *states)


def _first(output: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output[0]


def _attention(projections: _Projections, head_size: int, form: Form) -> FusedAttention | PortableAttention:
    if form.is_portable:
        return PortableAttention(projections, head_size)
    return FusedAttention(projections, head_size, form.split)


def fused(model: PreTrainedModel, form: Form) -> PreTrainedModel:
    """Returns a float32 copy of `model` on the CPU in the form that is traced; with fused operators it cannot be run."""
    model = copy.deepcopy(model).eval()
    if any(parameter.dtype != torch.float32 or parameter.device.type != "cpu" for parameter in model.parameters()):
        model = model.to("cpu", torch.float32)  # not always: small embeddings are kept in float16
    layout = head_layout(model)
    layers = model.base_model.get_submodule(layout.layer_map.layers)
    for i, layer in enumerate(layers):
        if not isinstance(layer, ExpertLayer):
            if layout.kept[i] and layout.layer_map.is_plain:
                _fuse_attention_(layer, layout, i, form)
        elif layer.router is None and layout.layer_map.is_plain:
            layers[i] = FusedExpertLayer(layer, layout, i, form)
    # A bias, a rotation or a window is written as the family computes it, out of standard operators.
    own = PORTABLE_ATTENTION if form.is_portable else ATTENTION
    model.config._attn_implementation = own if layout.layer_map.is_plain else "eager"
    return model


def _fuse_attention_(layer: nn.Module, layout: HeadLayout, i: int, form: Form) -> None:
    layer_map = layout.layer_map
    made: nn.Module = _attention(layout.heads_in(i), layout.head_size, form)
    if layer_map.output_is_inside:
        made = ProjectedAttention(made, layout.output(i))
    layer.set_submodule(layer_map.attention, made)


def _padding_mask(*args: object, attention_mask: torch.Tensor | None = None, **kwargs: object) -> torch.Tensor | None:
    return None if attention_mask is None else attention_mask.to(torch.int32)  # (batch, length)


def _padding_bias(*args: object, attention_mask: torch.Tensor | None = None, **kwargs: object) -> torch.Tensor | None:
    """What is added to scores, (batch, 1, 1, length): once for all layers."""
    return None if attention_mask is None else (1.0 - attention_mask[:, None, None, :].to(torch.float32)) * _MASKED


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """Attention of routed layers, whose projections are gathered for each sequence."""
    mask = None if attention_mask is None else attention_mask[:, None, None, :].bool()
    return sdpa_attention_forward(module, query, key, value, mask, **kwargs)


def _attend_with_bias(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def _sum_residuals_(graph: Any) -> None:
    """Writes a residual that LayerNorm reads as `Sum`, which is `Add` under another name.

    Of `Add` and LayerNorm ONNX Runtime makes one operator when it opens the file, and on a CPU that takes three times as
    long as the two.
    """
    for node in graph:
        if node.op_type == "Add" and not any(value.is_initializer() for value in node.inputs):
            if any(use.node.op_type == "LayerNormalization" for use in node.outputs[0].uses()):
                node.op_type = "Sum"


def write_graph(
    model: PreTrainedModel,
    inputs: Mapping[str, torch.Tensor],
    output_names: Sequence[str],
    path: Path,
    form: Form,
    with_hidden_states: bool = False,
) -> None:
    """Traces `model` and writes its graph, weights included.

    Args:
        model: The model; left as it is.
        inputs: A batch to trace with, under the names that the graph will ask for; no dimension may be 1.
        output_names: Fields of the model's output, in the order in which the graph returns them.
        path: Where to.
        form: Its operators.
        with_hidden_states: The graph also returns what goes into each layer and comes out of the last.
    """
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, _padding_mask)
    ALL_ATTENTION_FUNCTIONS.register(PORTABLE_ATTENTION, _attend_with_bias)
    ALL_MASK_ATTENTION_FUNCTIONS.register(PORTABLE_ATTENTION, _padding_bias)
    axes = ({0: "batch"}, {0: "batch", 1: "length"}, {0: "batch", 1: "choices", 2: "length"})
    dynamic = [axes[0] if name == "pixel_values" else axes[tensor.dim() - 1] for name, tensor in inputs.items()]
    traceable = fused(model, form)
    layers = tuple(traceable.base_model.get_submodule(head_layout(model).layer_map.layers)) if with_hidden_states else ()
    traced = _Traced(traceable, list(inputs), list(output_names), layers)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of shared axis names and torch's own deprecations
        program = torch.onnx.export(
            traced,
            tuple(inputs.values()),
            dynamo=True,
            input_names=list(inputs),
            output_names=list(output_names),
            dynamic_shapes={"tensors": tuple(dynamic)},
            opset_version=form.opset,
            verbose=False,
        )
    ClearMetadataAndDocStringPass()(program.model)  # stack traces with the paths of this machine
    _sum_residuals_(program.model.graph)
    program.save(path)
