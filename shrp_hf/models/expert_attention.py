"""Attention of an expert layer: every head an expert of its own, which a router may choose for each sequence."""

import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.bert.modeling_bert import eager_attention_forward


class ExpertLinear(nn.Linear):
    """The projections of all experts, stacked as the family stacks its heads.

    What is put around it (LoRA, a quantised form) takes hidden states alone, so it projects by all experts, and the chosen
    ones are picked afterwards: a gathered weight would give LoRA no gradient and no error.

    Args:
        dense: The projection to take over; weight (blocks * experts * head_size, hidden) and bias, which may be None, stay
            the same parameters.
        head_size: Width of one expert.
        blocks: How many projections are fused in it.
    """

    def __init__(self, dense: nn.Module, head_size: int, blocks: int = 1) -> None:
        nn.Module.__init__(self)  # no weights of its own
        self.out_features, self.in_features = dense.weight.shape
        self.head_size = head_size
        self.blocks = blocks
        self.weight = dense.weight
        self.bias = dense.bias

    def forward(self, hidden_states: torch.Tensor, experts: torch.Tensor | None = None) -> torch.Tensor:
        """Projects (batch, length, hidden) by all experts, or by those in `experts` (batch, k) only.

        Returns:
            Shape (batch, length, blocks * experts * head_size), or (batch, length, blocks * k * head_size).
        """
        if experts is None:
            return nn.functional.linear(hidden_states, self.weight, self.bias)
        weight = self._rows_of(experts, self.weight, self.weight.shape[1]).transpose(1, 2)
        if self.bias is None:
            return torch.bmm(hidden_states, weight)
        return torch.baddbmm(self._rows_of(experts, self.bias, 1).transpose(1, 2), hidden_states, weight)

    def _rows_of(self, experts: torch.Tensor, stacked: torch.Tensor, width: int) -> torch.Tensor:
        """Returns the rows of the chosen experts, shape (batch, blocks * k * head_size, width)."""
        rows = stacked.view(self.blocks, -1, self.head_size * width).index_select(1, experts.flatten())
        return rows.view(self.blocks, experts.shape[0], -1).transpose(0, 1).reshape(experts.shape[0], -1, width)


class ExpertAttention(nn.Module):
    """Attention by experts: each owns its query, key and value and attends alone.

    It takes the place, the modules and the arguments of the stock attention. Positions reach an expert as they reach the
    head that it was: its slice of a bias for all heads, or the rotation of its queries and keys.

    Args:
        config: The model's config; its layer map says where the projections are.
        layer_idx: Index of the layer.
        dense: The stock attention whose projections become the experts.
    """

    def __init__(self, config: Any, layer_idx: int, dense: nn.Module) -> None:
        super().__init__()
        layer_map = config.layer_map
        self.config = config
        self.layer_map = layer_map
        self.layer_idx = layer_idx
        self.is_causal = False  # sdpa would otherwise take a missing attribute for True
        self.active = True  # False: the layer is pending, and this is the attention of its dense half
        self.heads = tuple(range(config.num_attention_heads))  # original indices of the experts that are left
        self.attention_head_size = config.head_size
        self.scaling = self.attention_head_size**-0.5
        self.attention_dropout = getattr(config, layer_map.attention_dropout)
        self.sliding_window = getattr(dense, "sliding_window", None)
        self.arguments = named_arguments(dense.forward)
        self.stock_module = type(dense).__module__
        for name, child in dense.named_children():
            self.add_module(name, child)
        for part in layer_map.heads_in:
            name = self._own(part.path)
            linear = self._modules.get(name)
            if linear is not None and not isinstance(linear, ExpertLinear):
                self.add_module(name, ExpertLinear(linear, config.head_size, part.blocks))

    def forward(
        self, *args: Any, experts: torch.Tensor | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attends with the experts (batch, k), or with all that this layer has.

        Args:
            *args: As the stock attention takes them: hidden states (batch, length, hidden), a mask, positions.
            experts: Shape (batch, k).
            **kwargs: The same by name; what the stock attention does not name goes to the attention function.

        Returns:
            Head outputs (batch, length, k, head_size), and the attention maps (batch, k, length, length) in eager. Of a
            pending layer what the stock attention returns.
        """
        given = dict(zip(self.arguments, args, strict=False)) | kwargs
        query, key, value = self._project(given["hidden_states"], experts)  # (batch, k, length, head_size)
        mask = given.get("attention_mask")
        if self.layer_map.positions is not None:
            query, key, mask = self.layer_map.positions(self, query, key, mask, experts, given)
        passed = {name: value for name, value in given.items() if name not in self.arguments}
        if self.sliding_window is not None:  # in eager and sdpa it is in the mask
            passed["sliding_window"] = self.sliding_window
        eager = getattr(sys.modules[self.stock_module], "eager_attention_forward", eager_attention_forward)
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager)
        dropout = self.attention_dropout if self.training else 0.0
        heads, maps = attend(self, query, key, value, mask, dropout=dropout, scaling=self.scaling, **passed)
        return (heads if self.active else self._as_stock(heads)), maps

    def _project(self, hidden_states: torch.Tensor, experts: torch.Tensor | None) -> list[torch.Tensor]:
        """Returns query, key and value of the experts, each of shape (batch, k, length, head_size)."""
        parts, found = self.layer_map.heads_in[:3], {}
        for part in parts:
            if part.path not in found:
                found[part.path] = self._projected(getattr(self, self._own(part.path)), part.blocks, hidden_states, experts)
        shape = (*hidden_states.shape[:-1], -1, self.attention_head_size)
        return [part.of(found[part.path], dim=-1).view(shape).transpose(1, 2) for part in parts]

    def _projected(
        self, projection: nn.Module, blocks: int, hidden_states: torch.Tensor, experts: torch.Tensor | None
    ) -> torch.Tensor:
        if experts is None:
            return projection(hidden_states)
        if type(projection) is ExpertLinear:
            return projection(hidden_states, experts)
        states = projection(hidden_states).unflatten(-1, (blocks, -1, self.attention_head_size))
        index = experts[:, None, None, :, None].expand(-1, states.shape[1], blocks, -1, states.shape[4])
        return states.gather(3, index).flatten(2)

    def _as_stock(self, heads: torch.Tensor) -> torch.Tensor:
        """The heads' outputs one after the other, through W_O where the family keeps it in its attention."""
        output = heads.flatten(2)
        if self.layer_map.output_is_inside:
            for path in (self.layer_map.heads_out, *self.layer_map.after_heads):
                output = self.get_submodule(self._own(path))(output)
        return output

    def _own(self, path: str) -> str:
        """A path from the layer as a path from here."""
        return path.removeprefix(f"{self.layer_map.attention}.")

    def drop_dense_half_(self) -> None:
        """Forgets all but the experts' projections."""
        kept = {self._own(path) for path in (*self.layer_map.head_paths[:-1], *self.layer_map.position_modules)}
        for name in set(self._modules) - kept:
            del self._modules[name]

    def keep_experts_(self, positions: Sequence[int]) -> None:
        """Notes which experts are left, by their position among those that were there."""
        self.heads = tuple(self.heads[position] for position in positions)


def named_arguments(forward: Callable) -> tuple[str, ...]:
    """Returns the names of the arguments of a module's forward, in order."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return tuple(name for name, each in inspect.signature(forward).parameters.items() if each.kind in kinds)
