"""The expert layer of SHRP (arXiv 2512.20635): heads as experts, a Top-1 router, one shared expander instead of the FFN."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.output_capturing import CompileableContextVar

from .expert_attention import ExpertAttention, named_arguments
from .slicing import head_columns, keep_rows_

EXPANDER_GAIN = 0.1


class Router(nn.Module):
    """Scores every expert for every sequence: Linear(hidden -> experts) on the mean of the real tokens.

    The mean is a reconstruction; `config.router_pooling = "cls"` takes the first real token instead. The arithmetic is
    at least float32 whatever the model's precision, because an argmax over rounded scores flips.

    `usage` counts the sequences routed to each expert in training, shape (experts,), int64; it is saved with the model.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.pooling = config.router_pooling
        self.weight = nn.Parameter(torch.empty(config.num_attention_heads, config.hidden_size))
        self.bias = nn.Parameter(torch.empty(config.num_attention_heads))
        self.register_buffer("usage", torch.zeros(config.num_attention_heads, dtype=torch.int64))
        self.reset_parameters(config.initializer_range)

    @torch.no_grad()
    def reset_parameters(self, std: float) -> None:
        """Draws a fresh router: weights from a normal distribution, no bias, nothing counted."""
        init.normal_(self.weight, mean=0.0, std=std)
        init.zeros_(self.bias)
        init.zeros_(self.usage)

    def forward(self, hidden_states: torch.Tensor, token_mask: torch.Tensor | None) -> torch.Tensor:
        """Maps (batch, length, hidden) and a mask (batch, length), 1 for real tokens, to logits (batch, experts)."""
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        with torch.autocast(hidden_states.device.type, enabled=False):
            pooled = self._pool(hidden_states.to(dtype), token_mask)  # (batch, hidden)
            return nn.functional.linear(pooled, self.weight.to(dtype), self.bias.to(dtype))

    def _pool(self, hidden_states: torch.Tensor, token_mask: torch.Tensor | None) -> torch.Tensor:
        if self.pooling == "cls":
            if token_mask is None:
                return hidden_states[:, 0]
            first = token_mask.to(torch.int32).argmax(dim=1)  # not position 0: the padding may be on the left
            return hidden_states[torch.arange(first.shape[0], device=first.device), first]
        if token_mask is None:
            return hidden_states.mean(dim=1)
        weights = token_mask.to(hidden_states.dtype)
        total = torch.bmm(weights.unsqueeze(1), hidden_states).squeeze(1)
        return total / weights.sum(dim=1, keepdim=True).clamp(min=1)


class Expander(nn.Module):
    """Linear(head_size -> hidden) -> GELU -> LayerNorm, shared by the experts of a layer; it replaces W_O and the FFN.

    The start of the LayerNorm (gain 0.1, bias 0) is a reconstruction: the layer begins as a small step from its input.

    Args:
        config: The model's config.
        eps: Of the LayerNorm: that of the layer's own norms.
    """

    def __init__(self, config: Any, eps: float) -> None:
        super().__init__()
        self.dense = nn.Linear(config.head_size, config.hidden_size)
        self.activation = nn.GELU()
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=eps)
        init.constant_(self.LayerNorm.weight, EXPANDER_GAIN)

    def forward(self, head_output: torch.Tensor) -> torch.Tensor:
        """Maps (batch, length, head_size) to (batch, length, hidden)."""
        return self.LayerNorm(self.activation(self.dense(head_output)))

    @torch.no_grad()
    def warm_start_(self, output_weight: torch.Tensor) -> None:
        """Starts from W_O (hidden, heads * head_size): sqrt(heads) times the mean of its head slices (reconstruction)."""
        slices = output_weight.view(output_weight.shape[0], -1, self.dense.in_features)  # (hidden, heads, head_size)
        self.dense.weight.copy_(slices.mean(dim=1) * math.sqrt(slices.shape[1]))
        self.dense.bias.zero_()
        self.LayerNorm.weight.fill_(EXPANDER_GAIN)
        self.LayerNorm.bias.zero_()


class Routing:
    """What the routers of one forward pass of a base model are told, and what they say.

    Stock encoders call their layers with arguments of their own, so it does not pass through them.

    Args:
        model: The base model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.token_mask: torch.Tensor | None = None
        self.logits: list[torch.Tensor] = []
        self.balance_loss: torch.Tensor | None = None


ROUTING = CompileableContextVar("shrp_routing")
"""The `Routing` of the forward pass that runs; of each thread its own."""


class ExpertLayer(GradientCheckpointingLayer):
    """An encoder layer after SHRP: out = x + dropout(gate * Expander(mean of the chosen experts' outputs)).

    Router and experts read x; in a pre-norm family they read norm(x), as its heads did, and the sum is with x (our reading:
    the paper has a post-norm family). The gate p / stopgrad(p) is 1 in value and carries the router's gradient
    (reconstruction). With one expert a sequence it multiplies the expander's output; with several, each head output before
    their mean, the only place where they are apart. A *pending* layer also holds its dense half and runs as that until it
    is `active`.

    Args:
        config: The model's config; its layer map says what the family's layers are like.
        layer_idx: Index of the layer.
        dense: The stock layer that is taken over, with its modules; their parameters are not copied.
    """

    def __init__(self, config: Any, layer_idx: int, dense: nn.Module) -> None:
        super().__init__()
        self.layer_map = config.layer_map
        self.num_chosen = config.experts_per_sequence
        self.arguments = named_arguments(dense.forward)
        # What a family's encoder asks a layer about itself, such as whether it attends within a window.
        plain = {name: value for name, value in vars(dense).items() if isinstance(value, bool | int | float | str)}
        for name in plain.keys() - {"training", "gradient_checkpointing"}:
            setattr(self, name, plain[name])
        stock, place = dense.get_submodule(self.layer_map.attention), self.layer_map.attention
        dense.set_submodule(place, ExpertAttention(config, layer_idx, stock).train(stock.training))
        dense.gradient_checkpointing = False  # this layer does it
        self._dense: tuple[nn.Module, ...] = (dense,)  # in a tuple: its modules are modules of this one
        for name, child in dense.named_children():
            self.add_module(name, child)
        if "dropout" not in self._modules:
            self.dropout = nn.Dropout(getattr(config, self.layer_map.hidden_dropout))
        weight = dense.get_submodule(self.layer_map.heads_out).weight
        eps = next(module.eps for module in dense.modules() if isinstance(module, nn.LayerNorm))
        self.router = Router(config).to(weight.device, weight.dtype)
        self.expander = Expander(config, eps).to(weight.device, weight.dtype)
        self.active = layer_idx in config.expert_layers
        self._copy_hooks_(dense, stock)
        self.train(dense.training)
        if layer_idx not in config.pending_layers:
            self.drop_dense_half_()

    def _copy_hooks_(self, dense: nn.Module, stock: nn.Module) -> None:
        # Transformers installs what captures hidden states and attentions once, at the first call that asks.
        self._forward_hooks.update(dense._forward_hooks)
        self.experts._forward_hooks.update(stock._forward_hooks)

    @property
    def experts(self) -> ExpertAttention:
        """The attention of the experts, which stands where the family has its own."""
        return self.get_submodule(self.layer_map.attention)

    @property
    def active(self) -> bool:
        """Whether it runs as an expert layer."""
        return self.experts.active

    @active.setter
    def active(self, active: bool) -> None:
        self.experts.active = active

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Takes what the stock layer takes, and returns what it returns; what the router says goes to `ROUTING`."""
        given = dict(zip(self.arguments, args, strict=False)) | kwargs
        hidden_states = given.pop("hidden_states")
        routing = ROUTING.get() if self.router is not None and self.active else None
        if routing is not None:
            given["token_mask"] = routing.token_mask
        output, logits, maps = super().__call__(hidden_states, **given)
        if routing is not None:
            routing.logits.append(logits)
        return (output, maps) if self.layer_map.returns_maps else output

    def forward(
        self, hidden_states: torch.Tensor, token_mask: torch.Tensor | None = None, **given: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Maps (batch, length, hidden) to the same shape.

        Args:
            hidden_states: Shape (batch, length, hidden).
            token_mask: Shape (batch, length), 1 for real tokens; what the router averages over. None: all are.
            **given: What else the stock layer takes: the mask in the form that the attention implementation wants,
                positions, what goes to the attention function.

        Returns:
            The new hidden states, the router's logits (batch, experts) where a router runs, else None, and the attention
            maps where there are any.
        """
        if not self.active:
            return self._dense_forward(hidden_states, **given)
        norm = self.layer_map.norm_before
        states = hidden_states if norm is None else self.get_submodule(norm)(hidden_states)
        attention = self.experts
        passed = {k: v for k, v in given.items() if k in attention.arguments or k not in self.arguments}
        if self.router is None:
            heads, maps = attention(states, **passed)
            update = self.expander(heads.squeeze(2) if heads.shape[2] == 1 else heads.mean(dim=2))
            return hidden_states + self.dropout(update), None, maps

        logits = self.router(states, token_mask)  # (batch, experts)
        experts = logits.topk(self.num_chosen, dim=-1).indices  # (batch, k)
        heads, maps = attention(states, experts=experts, **passed)
        gate = logits.softmax(dim=-1).gather(-1, experts).clamp(min=torch.finfo(logits.dtype).tiny)
        gate = (gate / gate.detach()).to(hidden_states.dtype)  # (batch, k), all ones
        if self.num_chosen == 1:
            update = gate.unsqueeze(-1) * self.expander(heads.squeeze(2))
        else:
            update = self.expander((gate[:, None, :, None] * heads).mean(dim=2))
        return hidden_states + self.dropout(update), logits, maps

    def _dense_forward(self, hidden_states: torch.Tensor, **given: Any) -> tuple[torch.Tensor, None, torch.Tensor | None]:
        dense = self._dense[0]
        dense.training = self.training
        output = dense.forward(hidden_states, **given)
        if isinstance(output, torch.Tensor):
            return output, None, None
        return output[0], None, output[1] if len(output) > 1 else None

    def warm_start_(self) -> None:
        """Sets the expander from the dense half as it is now, and runs as an expert layer from here on."""
        self.expander.warm_start_(self.get_submodule(self.layer_map.heads_out).weight)
        self.active = True

    def drop_dense_half_(self) -> None:
        """Forgets W_O, the FFN and the norms around them."""
        kept = {path: self.get_submodule(path) for path in (self.layer_map.attention, self.layer_map.norm_before) if path}
        for name in set(self._modules) - {"router", "expander", "dropout"}:
            del self._modules[name]
        for path, module in kept.items():
            *parents, name = path.split(".")
            place: nn.Module = self
            for parent in parents:
                if parent not in place._modules:
                    place.add_module(parent, nn.Module())
                place = place._modules[parent]
            place.add_module(name, module)
        self._dense = ()
        self.experts.drop_dense_half_()

    def keep_experts_(self, positions: Sequence[int]) -> None:
        """Removes the router and all experts but those at `positions`, counted among those that the layer has now."""
        attention = self.experts
        keep_rows_(self, self.layer_map.heads_in, head_columns(positions, attention.attention_head_size))
        attention.keep_experts_(positions)
        self.router = None


class _AllReduceSum(torch.autograd.Function):
    """Sum over all processes whose gradient is the sum of all processes' gradients."""

    @staticmethod
    def forward(ctx: object, tensor: torch.Tensor) -> torch.Tensor:
        total = tensor.clone()
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: object, grad: torch.Tensor) -> torch.Tensor:
        grad = grad.clone()
        torch.distributed.all_reduce(grad)
        return grad


def sum_over_processes(tensor: torch.Tensor) -> torch.Tensor:
    """Sums over the processes of a distributed run, differentiably; returns the tensor itself where there is one."""
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        return _AllReduceSum.apply(tensor)
    return tensor


def load_balancing_loss(mean_probabilities: torch.Tensor) -> torch.Tensor:
    """Bidirectional KL between routing and uniform usage: KL(p || u) + KL(u || p), mean over layers.

    Args:
        mean_probabilities: Router softmax averaged over a batch, shape (layers, experts).

    Returns:
        A scalar, 0 for uniform usage. The paper's weight for it is 0.1; averaging over the batch before the divergence
        is a reconstruction.
    """
    p = mean_probabilities.clamp(min=torch.finfo(mean_probabilities.dtype).tiny)
    log_ratio = p.log() + math.log(p.shape[-1])  # log(p / u)
    return ((p - 1 / p.shape[-1]) * log_ratio).sum(dim=-1).mean()
