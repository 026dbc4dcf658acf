"""The form in which a model is exported: one operator for each attention, its projections packed."""

import copy

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from shrp_hf.families import FAMILIES, HeadLayout, head_layout

IMPLEMENTATION = "shrp_onnx"


class FusedAttention(nn.Module):
    """Stands for a family's attention module while it is traced: ONNX Runtime's `com.microsoft::Attention`.

    Query, key and value are one matrix product; scaling, mask and softmax are inside the operator. It takes the mask as
    (batch, length), so nothing is expanded to (batch, 1, length, length) and shared by nobody.

    Args:
        projections: Query, key and value: weights (heads * head_size, hidden).
        head_size: Width of a head.
        output: The output projection, where the family keeps it inside its attention module.
        splits_heads: Return (batch, length, heads, head_size), as an expert layer wants.
    """

    def __init__(
        self, projections: tuple[nn.Module, ...], head_size: int, output: nn.Module | None, splits_heads: bool
    ) -> None:
        super().__init__()
        weights = [module.weight.detach() for module in projections]
        self.weight = nn.Parameter(torch.cat(weights).T.contiguous())  # (hidden, 3 * width)
        biases = [w.new_zeros(len(w)) if m.bias is None else m.bias for w, m in zip(weights, projections, strict=True)]
        self.bias = nn.Parameter(torch.cat(biases).detach())
        self.width = len(weights[0])
        self.head_size = head_size
        self.output = output
        self.splits_heads = splits_heads

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: object
    ) -> tuple[torch.Tensor, None]:
        """Maps (batch, length, hidden) and a mask (batch, length) to the attention's output."""
        heads = torch.onnx.ops.symbolic(
            "com.microsoft::Attention",
            (hidden_states, self.weight, self.bias, attention_mask),
            {
                "num_heads": self.width // self.head_size,
                "qkv_hidden_sizes": [self.width] * 3,
                "mask_filter_value": torch.finfo(torch.float32).min,
            },
            dtype=hidden_states.dtype,
            shape=(*hidden_states.shape[:-1], self.width),
            version=1,
        )
        if self.output is not None:
            return self.output(heads), None
        return (heads.unflatten(-1, (-1, self.head_size)) if self.splits_heads else heads), None


def fused(model: PreTrainedModel) -> PreTrainedModel:
    """Returns a float32 copy in evaluation mode in the form that is traced; it cannot run.

    A routed layer gathers its experts' weights, for which there is no operator, and keeps its form; so does all of a
    model whose family has no head map.
    """
    model = copy.deepcopy(model).float().eval()
    if model.config.model_type not in FAMILIES:
        return model
    ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, _attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, _flat_mask)
    layout = head_layout(model)
    for layer, module in enumerate(layout.layers):
        if not layout.kept[layer] or (layer in layout.expert_layers and layout.is_routed):
            continue
        module.set_submodule(layout.head_map.attention, _fused_attention(layout, layer))
    model.set_attn_implementation(IMPLEMENTATION)
    return model


def _fused_attention(layout: HeadLayout, layer: int) -> FusedAttention:
    head_map = layout.head_map
    is_inside = head_map.output.startswith(f"{head_map.attention}.")
    is_expert = layer in layout.expert_layers
    output = layout.output(layer) if is_inside and not is_expert else None
    return FusedAttention(layout.projections(layer), layout.head_size, output, splits_heads=is_expert)


def _flat_mask(*args: object, attention_mask: torch.Tensor | None = None, **kwargs: object) -> torch.Tensor | None:
    return None if attention_mask is None else attention_mask.to(torch.int32)


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """Attention in plain operators, from (batch, heads, length, head_size): what routed layers run."""
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + (1 - attention_mask[:, None, None, :].to(scores.dtype)) * torch.finfo(scores.dtype).min
    return (scores.softmax(dim=-1) @ value).transpose(1, 2), None
