"""Where a layer keeps its attention heads, and how a layer is made smaller by them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class HeadMap:
    """Where a family keeps its heads; every path but `layers` starts at the layer, `layers` at the base model.

    Args:
        layers: The `ModuleList` of layers.
        attention: The module whose forward attends.
        projections: Query, key and value projection, in this order; head h owns rows h * head_size onwards.
        output: The output projection W_O; head h owns columns h * head_size onwards.
        head_count: The attribute of the attention module that holds its number of heads.
    """

    layers: str
    attention: str
    projections: tuple[str, str, str]
    output: str
    head_count: str = "num_attention_heads"


BERT_HEAD_MAP = HeadMap(
    layers="encoder.layer",
    attention="attention.self",
    projections=("attention.self.query", "attention.self.key", "attention.self.value"),
    output="attention.output.dense",
)
"""Also RoBERTa's and ELECTRA's."""

DISTILBERT_HEAD_MAP = HeadMap(
    layers="transformer.layer",
    attention="attention",
    projections=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
    output="attention.out_lin",
    head_count="n_heads",
)

VIT_HEAD_MAP = HeadMap(
    layers="layers",
    attention="attention",
    projections=("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    output="attention.o_proj",
)


class BiasOnly(nn.Module):
    """The output projection of a layer without heads: nothing is left of it but its bias.

    Args:
        bias: The bias of the output projection, shape (hidden,), or None.
        hidden_size: Width of the layer.
    """

    def __init__(self, bias: nn.Parameter | None, hidden_size: int) -> None:
        super().__init__()
        self.bias = bias
        self.hidden_size = hidden_size

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Maps (batch, length, anything) to the bias, (batch, length, hidden)."""
        shape = (*hidden_states.shape[:-1], self.hidden_size)
        return hidden_states.new_zeros(shape) if self.bias is None else self.bias.expand(shape)


class SilentAttention(nn.Module):
    """The attention of a layer without heads: an explicit skip, because a projection of width zero breaks in ONNX.

    Args:
        config: The model's config; tells whether attention maps are expected.
        output_name: Name of the output projection, where the family keeps it inside its attention module.
        output: That projection, reduced to its bias.
    """

    def __init__(self, config: object, output_name: str | None = None, output: nn.Module | None = None) -> None:
        super().__init__()
        self.config = config
        self.output_name = output_name
        if output_name is not None:
            self.add_module(output_name, output)

    def forward(self, hidden_states: torch.Tensor, *args: object, **kwargs: object) -> tuple:
        """Returns (batch, length, hidden) and, in eager attention, an attention map without heads."""
        batch, length = hidden_states.shape[:2]
        is_eager = self.config._attn_implementation == "eager"
        weights = hidden_states.new_empty(batch, 0, length, length) if is_eager else None
        if self.output_name is not None:
            hidden_states = self.get_submodule(self.output_name)(hidden_states)
        return hidden_states, weights


def slice_linear(linear: nn.Module, index: torch.Tensor, dim: int) -> nn.Linear:
    """Returns a new `nn.Linear` of the rows (dim 0) or columns (dim 1) in `index`, with dtype and device kept.

    Stock `prune_linear_layer` turns float64 into float32, hence our own.
    """
    weight = linear.weight.detach().index_select(dim, index.to(linear.weight.device))
    bias = linear.bias
    if bias is not None:
        bias = bias.detach().index_select(0, index.to(bias.device)) if dim == 0 else bias.detach().clone()
    sliced = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    sliced.weight = nn.Parameter(weight.contiguous(), requires_grad=linear.weight.requires_grad)
    if bias is not None:
        sliced.bias = nn.Parameter(bias, requires_grad=linear.bias.requires_grad)
    return sliced.train(linear.training)


def head_columns(positions: Sequence[int], head_size: int) -> torch.Tensor:
    """Returns the rows that the heads at `positions` own, shape (len(positions) * head_size,)."""
    heads = torch.tensor(list(positions), dtype=torch.long)
    return (heads[:, None] * head_size + torch.arange(head_size)).flatten()


def keep_heads_(layer: nn.Module, head_map: HeadMap, positions: Sequence[int], head_size: int) -> None:
    """Cuts an ordinary layer down to the heads at `positions`, counted among those that it has now.

    A layer that keeps none gets an explicit skip that equals masking: its attention adds the output bias only.
    """
    attention = layer.get_submodule(head_map.attention)
    output = layer.get_submodule(head_map.output)
    if not positions:
        _silence_(layer, head_map, attention, output)
        return
    index = head_columns(positions, head_size)
    for path in head_map.projections:
        layer.set_submodule(path, slice_linear(layer.get_submodule(path), index, dim=0))
    layer.set_submodule(head_map.output, slice_linear(output, index, dim=1))
    setattr(attention, head_map.head_count, len(positions))
    if hasattr(attention, "all_head_size"):
        attention.all_head_size = len(positions) * head_size


def _silence_(layer: nn.Module, head_map: HeadMap, attention: nn.Module, output: nn.Module) -> None:
    if isinstance(attention, SilentAttention):
        return
    bias_only = BiasOnly(output.bias, output.weight.shape[0])
    inner = head_map.output.removeprefix(head_map.attention + ".")
    if inner != head_map.output:
        layer.set_submodule(head_map.attention, SilentAttention(attention.config, inner, bias_only))
    else:
        layer.set_submodule(head_map.attention, SilentAttention(attention.config))
        layer.set_submodule(head_map.output, bias_only)
    # Transformers installs what captures attention maps once, at the first call that asks for them.
    layer.get_submodule(head_map.attention)._forward_hooks.update(attention._forward_hooks)


def heads_to_keep(
    plan: object, present: Sequence[Sequence[int]], num_heads: int, expert_layers: Sequence[int] = ()
) -> list[list[int]]:
    """Reads a plan for a model that has the heads in `present`.

    Args:
        plan: A `KeepPlan` (heads of ordinary and experts of expert layers that *stay*), or the form of Transformers 4,
            `{layer: [heads to remove]}`, for ordinary layers. Indices are those of the unpruned model.
        present: Per layer, the original indices of the heads (experts) that are there.
        num_heads: Heads per layer of the unpruned model.
        expert_layers: The layers whose heads are experts.

    Returns:
        Per layer, the original indices of what stays, ascending.

    Raises:
        ValueError: The plan has another shape, names a head that is gone or a layer that is not there, leaves an
            expert layer without experts, or names one in the form of Transformers 4.
    """
    if isinstance(plan, Mapping):
        return _left_by_removal(plan, present, expert_layers)
    kept = getattr(plan, "kept", None)
    if kept is None:
        raise ValueError(f"`plan` must be a KeepPlan or a dict {{layer: [heads to remove]}}, got {type(plan).__name__}.")
    if len(kept) != len(present) or getattr(plan, "num_heads", None) != num_heads:
        raise ValueError(
            f"`plan` is for {len(kept)} layers of {getattr(plan, 'num_heads', None)} heads, but this model has "
            f"{len(present)} layers of {num_heads} heads."
        )
    for i, heads in enumerate(kept):
        gone = sorted(set(heads) - set(present[i]))
        if gone:
            raise ValueError(f"`plan` keeps heads {gone} of layer {i}, which are gone; left are {list(present[i])}.")
        if i in expert_layers and not heads:
            raise ValueError(f"`plan` keeps 0 experts of expert layer {i}: it needs at least one.")
    return [sorted(heads) for heads in kept]


def _left_by_removal(removed: Mapping, present: Sequence[Sequence[int]], expert_layers: Sequence[int]) -> list[list[int]]:
    left = [list(heads) for heads in present]
    for layer, heads in removed.items():
        if type(layer) is not int or not 0 <= layer < len(left):
            raise ValueError(f"`plan` names layer {layer!r}, but the model's layers are 0 to {len(left) - 1}.")
        if layer in expert_layers:
            raise ValueError(
                f"`plan` removes heads of layer {layer}, which is an expert layer: name the experts that stay in a KeepPlan."
            )
        is_listed = isinstance(heads, Iterable) and not isinstance(heads, Mapping | str)
        heads = list(heads) if is_listed else heads
        if not is_listed or any(type(head) is not int for head in heads):
            raise ValueError(f"`plan` must name the heads of layer {layer} by a list of whole numbers, got {heads!r}.")
        gone = sorted(set(heads) - set(left[layer]))
        if gone:
            raise ValueError(f"`plan` removes heads {gone} of layer {layer}, which are gone; left are {left[layer]}.")
        left[layer] = [head for head in left[layer] if head not in set(heads)]
    return left
