"""The expert layer of SHRP (arXiv 2512.20635): heads as experts, a Top-1 router, one shared expander instead of the FFN."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.bert.modeling_bert import eager_attention_forward

from .slicing import head_columns, slice_linear

EXPANDER_GAIN = 0.1
JOINED_FROM = 512  # tokens in a batch from which one product for query, key and value is faster than three


class Router(nn.Module):
    """Scores every expert for every sequence: Linear(hidden -> experts) on the mean of the real tokens.

    The mean is a reconstruction; `config.router_pooling = "cls"` takes the first real token instead. The arithmetic is
    at least float32 whatever the model's precision, because an argmax over rounded scores flips.

    `usage` counts the sequences routed to each expert in training, shape (experts,), int64; it is saved with the model.
    """

    def __init__(self, config: object) -> None:
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


def _only_computes(*modules: nn.Module) -> bool:
    """Whether what these modules do may be done otherwise: no gradient, no graph being traced, nobody who watches.

    An expert layer computes so little that fresh memory for each wide tensor, and reading its input three times, show in its
    time (docs/benchmarks-serving.md).
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    return not any(
        module.training or module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
        for module in modules
    )


class ExpertLinear(nn.Module):
    """The query, key or value projections of all experts, stacked as BERT stacks its heads.

    Deliberately no `nn.Linear`: LoRA on a weight that is gathered by expert would get no gradient and no error, so PEFT
    must be able to refuse it.

    Args:
        dense: The projection to take over; weight (experts * head_size, hidden) and bias stay the same parameters.
        head_size: Width of one expert.
    """

    def __init__(self, dense: nn.Module, head_size: int) -> None:
        super().__init__()
        self.head_size = head_size
        self.weight = dense.weight
        self.bias = dense.bias

    def forward(self, hidden_states: torch.Tensor, experts: torch.Tensor | None = None) -> torch.Tensor:
        """Projects (batch, length, hidden) by all experts, or by those in `experts` (batch, k) only.

        Returns:
            Shape (batch, length, experts * head_size), or (batch, length, k * head_size).
        """
        if experts is None:
            return nn.functional.linear(hidden_states, self.weight, self.bias)
        batch, chosen = experts.shape
        weight = self.weight.view(-1, self.head_size * self.weight.shape[1]).index_select(0, experts.flatten())
        weight = weight.view(batch, chosen * self.head_size, -1)
        bias = self.bias.view(-1, self.head_size).index_select(0, experts.flatten()).view(batch, 1, -1)
        return torch.baddbmm(bias, hidden_states, weight.transpose(1, 2))


class ExpertAttention(nn.Module):
    """Attention by experts: each owns its query, key and value and attends alone.

    Args:
        config: The model's config.
        layer_idx: Index of the layer.
        dense: The stock self-attention whose projections become the experts.
    """

    def __init__(self, config: object, layer_idx: int, dense: nn.Module) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.is_causal = False  # sdpa would otherwise take a missing attribute for True
        self.attention_head_size = config.hidden_size // config.num_attention_heads
        self.scaling = self.attention_head_size**-0.5
        self.dropout = config.attention_probs_dropout_prob
        self.query = ExpertLinear(dense.query, self.attention_head_size)
        self.key = ExpertLinear(dense.key, self.attention_head_size)
        self.value = ExpertLinear(dense.value, self.attention_head_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        experts: torch.Tensor | None = None,
        **kwargs: object,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attends with the experts (batch, k), or with all that this layer has.

        Returns:
            Head outputs (batch, length, k, head_size), and the attention maps (batch, k, length, length) in eager.
        """
        shape = (*hidden_states.shape[:-1], -1, self.attention_head_size)
        projected = self._project(hidden_states, experts)
        query, key, value = (states.view(shape).transpose(1, 2) for states in projected)  # (batch, k, length, head_size)
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.dropout if self.training else 0.0
        return attend(self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)

    def _project(self, hidden_states: torch.Tensor, experts: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        projections = (self.query, self.key, self.value)
        if experts is not None:
            return tuple(projection(hidden_states, experts) for projection in projections)
        plain = all(type(projection) is nn.Linear for projection in projections) and _only_computes(*projections)
        if not plain or hidden_states.shape[:-1].numel() < JOINED_FROM:
            return tuple(projection(hidden_states) for projection in projections)
        # Joined for each call: it costs little where there are many tokens, and there is no copy that could be out of date.
        weight = torch.cat([projection.weight for projection in projections])
        bias = torch.cat([projection.bias for projection in projections])
        return nn.functional.linear(hidden_states, weight, bias).chunk(3, dim=-1)


class Expander(nn.Module):
    """Linear(head_size -> hidden) -> GELU -> LayerNorm, shared by the experts of a layer; it replaces W_O and the FFN.

    The start of the LayerNorm (gain 0.1, bias 0) is a reconstruction: the layer begins as a small step from its input.
    """

    def __init__(self, config: object) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size // config.num_attention_heads, config.hidden_size)
        self.activation = nn.GELU()
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        init.constant_(self.LayerNorm.weight, EXPANDER_GAIN)

    def forward(self, head_output: torch.Tensor) -> torch.Tensor:
        """Maps (batch, length, head_size) to (batch, length, hidden)."""
        expanded = self.dense(head_output)
        if _only_computes(self.dense, self.activation):
            return self.LayerNorm(nn.functional.gelu(expanded, out=expanded))
        return self.LayerNorm(self.activation(expanded))

    @torch.no_grad()
    def warm_start_(self, output_weight: torch.Tensor) -> None:
        """Starts from W_O (hidden, heads * head_size): sqrt(heads) times the mean of its head slices (reconstruction)."""
        slices = output_weight.view(output_weight.shape[0], -1, self.dense.in_features)  # (hidden, heads, head_size)
        self.dense.weight.copy_(slices.mean(dim=1) * math.sqrt(slices.shape[1]))
        self.dense.bias.zero_()
        self.LayerNorm.weight.fill_(EXPANDER_GAIN)
        self.LayerNorm.bias.zero_()


class ExpertLayer(GradientCheckpointingLayer):
    """An encoder layer after SHRP: out = x + dropout(gate * Expander(mean of the chosen experts' outputs)).

    The gate p / stopgrad(p) is 1 in value and carries the router's gradient (reconstruction). With one expert a
    sequence it multiplies the expander's output; with several, each head output before their mean, the only place
    where they are apart. A *pending* layer also holds its dense half and runs as that until it is `active`.

    Args:
        config: The model's config.
        layer_idx: Index of the layer.
        dense: The stock layer that is taken over; its parameters are not copied.
    """

    def __init__(self, config: object, layer_idx: int, dense: nn.Module) -> None:
        super().__init__()
        self.num_chosen = config.experts_per_sequence
        self.active = layer_idx in config.expert_layers
        self.attention = nn.Module()
        self.attention.self = ExpertAttention(config, layer_idx, dense.attention.self)
        self.attention.output = dense.attention.output
        self.intermediate = dense.intermediate
        self.output = dense.output
        weight = dense.attention.self.query.weight
        self.router = Router(config).to(weight.device, weight.dtype)
        self.expander = Expander(config).to(weight.device, weight.dtype)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.train(dense.training)
        if layer_idx not in config.pending_layers:
            self.drop_dense_half_()

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_mask: torch.Tensor | None = None,
        **kwargs: object,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Maps (batch, length, hidden) to the same shape.

        Args:
            hidden_states: Shape (batch, length, hidden).
            attention_mask: The mask in the form that the attention implementation wants.
            token_mask: Shape (batch, length), 1 for real tokens; what the router averages over.
            **kwargs: Passed on to the attention function.

        Returns:
            The new hidden states, and the router's logits (batch, experts) where a router runs, else None.
        """
        if not self.active:
            return self._dense_forward(hidden_states, attention_mask, **kwargs), None
        if self.router is None:
            heads, _ = self.attention.self(hidden_states, attention_mask, **kwargs)
            update = self.expander(heads.squeeze(2) if heads.shape[2] == 1 else heads.mean(dim=2))
            if _only_computes(self.expander.LayerNorm, self.expander) and update.dtype == hidden_states.dtype:
                return update.add_(hidden_states), None
            return hidden_states + self.dropout(update), None

        logits = self.router(hidden_states, token_mask)  # (batch, experts)
        experts = logits.topk(self.num_chosen, dim=-1).indices  # (batch, k)
        heads, _ = self.attention.self(hidden_states, attention_mask, experts=experts, **kwargs)
        gate = logits.softmax(dim=-1).gather(-1, experts).clamp(min=torch.finfo(logits.dtype).tiny)
        gate = (gate / gate.detach()).to(hidden_states.dtype)  # (batch, k), all ones
        if self.num_chosen == 1:
            update = gate.unsqueeze(-1) * self.expander(heads.squeeze(2))
        else:
            update = self.expander((gate[:, None, :, None] * heads).mean(dim=2))
        return hidden_states + self.dropout(update), logits

    def _dense_forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, **kwargs: object
    ) -> torch.Tensor:
        heads, _ = self.attention.self(hidden_states, attention_mask, **kwargs)
        attended = self.attention.output(heads.flatten(2), hidden_states)
        return self.output(self.intermediate(attended), attended)

    def warm_start_(self) -> None:
        """Sets the expander from the dense half as it is now, and runs as an expert layer from here on."""
        self.expander.warm_start_(self.attention.output.dense.weight)
        self.active = True

    def drop_dense_half_(self) -> None:
        """Forgets W_O and the FFN."""
        self.attention.output = self.intermediate = self.output = None

    def keep_experts_(self, positions: Sequence[int]) -> None:
        """Removes the router and all experts but those at `positions`, counted among those that the layer has now."""
        attention = self.attention.self
        index = head_columns(positions, attention.attention_head_size)
        for name in ("query", "key", "value"):
            setattr(attention, name, slice_linear(getattr(attention, name), index, dim=0))
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
