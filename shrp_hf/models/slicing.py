"""How a layer is made smaller: fewer heads, fewer FFN neurons, or none of either."""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .layer_map import LayerMap, Part, row_index


@dataclass(frozen=True, eq=False)
class OutputMeans:
    """What heads and neurons put out on average, over the real tokens of calibration data; of one model as it is.

    Args:
        heads: Per layer the mean output of each head before W_O, shape (heads, head_size); None: not measured.
        neurons: Per layer the mean activation of each neuron, shape (neurons,); None: not measured.
    """

    heads: tuple[torch.Tensor | None, ...]
    neurons: tuple[torch.Tensor | None, ...]

    def of_layer(
        self, layer: int, head_shape: tuple[int, int], num_neurons: int
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Returns the means of a layer's heads and neurons.

        Args:
            layer: Index of the layer.
            head_shape: Heads that it has, and their size.
            num_neurons: Neurons that it has.

        Raises:
            ValueError: They are of a layer of another size.
        """
        found = []
        for kind, shape in (("heads", head_shape), ("neurons", (num_neurons,))):
            means = getattr(self, kind)
            mean = means[layer] if layer < len(means) else None
            if mean is None or tuple(mean.shape) != shape:
                have = "none" if mean is None else f"those of shape {tuple(mean.shape)}"
                if shape[0]:
                    raise ValueError(
                        f"`output_means` has {have} for the {kind} of layer {layer}, which need {shape}: take the means of "
                        "this very model (`StatsRequest(means=True)`)."
                    )
                mean = None
            found.append(mean)
        return found[0], found[1]


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
        # A copy, because a view of a parameter requires a gradient even where none is computed, and torch's counters trip.
        return hidden_states.new_zeros(shape) if self.bias is None else self.bias.clone().expand(shape)


class FirstColumns(nn.Module):
    """The first FFN matrix of a layer without neurons: hands on so many of its input's columns, which nobody reads.

    What lies between the two matrices runs on them as it is, for next to nothing; a projection of width zero breaks in ONNX.

    Args:
        count: How many: one for each block of rows that the matrix had.
    """

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Maps (batch, length, hidden) to (batch, length, count)."""
        return hidden_states[..., : self.count]


class SilentAttention(nn.Module):
    """The attention of a layer without heads: an explicit skip, because a projection of width zero breaks in ONNX.

    Args:
        config: The model's config; tells whether attention maps are expected.
        steps: What else the attention module did, by its name there: the output projection, reduced to its bias, where the
            family keeps it inside, and what follows it.
        residual_norm: Name of the last of the steps where that takes what came so far plus the attention's input.
    """

    def __init__(self, config: object, steps: Mapping[str, nn.Module] | None = None, residual_norm: str | None = None) -> None:
        super().__init__()
        self.config = config
        self.steps = tuple(steps or ())
        self.residual_norm = residual_norm
        for name, module in (steps or {}).items():
            self.add_module(name, module)

    def forward(self, hidden_states: torch.Tensor, *args: object, **kwargs: object) -> tuple:
        """Returns (batch, length, hidden) and, in eager attention, an attention map without heads."""
        batch, length = hidden_states.shape[:2]
        is_eager = self.config._attn_implementation == "eager"
        weights = hidden_states.new_empty(batch, 0, length, length) if is_eager else None
        output = hidden_states
        for name in self.steps:
            output = self.get_submodule(name)(output + hidden_states if name == self.residual_norm else output)
        return output, weights


class OwnBias:
    """A forward pre-hook that takes, of a bias for all heads, those of the heads that are left.

    Args:
        module: The attention module.
        name: The argument of its forward.
        heads: Original indices of the heads that are left.
    """

    def __init__(self, module: nn.Module, name: str, heads: Sequence[int]) -> None:
        self.name = name
        self.heads = list(heads)
        self.position = list(inspect.signature(module.forward).parameters).index(name)

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Maps (batch, all heads, ...) to (batch, heads, ...)."""
        if len(args) > self.position and args[self.position] is not None:
            bias = args[self.position][:, self.heads]
            return (*args[: self.position], bias, *args[self.position + 1 :]), kwargs
        if kwargs.get(self.name) is not None:
            return args, kwargs | {self.name: kwargs[self.name][:, self.heads]}
        return None


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


def keep_heads_(
    layer: nn.Module,
    layer_map: LayerMap,
    present: Sequence[int],
    kept: Sequence[int],
    config: Any,
    means: torch.Tensor | None = None,
) -> None:
    """Cuts an ordinary layer down to some of its heads.

    A layer that keeps none gets an explicit skip that equals masking: its attention adds the output bias only.

    Args:
        layer: The layer.
        layer_map: Where it keeps its heads.
        present: Original indices of the heads that it has now.
        kept: Those of the heads that stay.
        config: The model's Shrp config.
        means: Mean output of the present heads, shape (heads, head_size): what is cut leaves its own in the output bias.
    """
    if len(kept) == len(present):
        return
    output = layer.get_submodule(layer_map.heads_out)
    index = head_columns([present.index(head) for head in kept], config.head_size)
    if means is not None:
        _absorb_(output, means.flatten(), index)
    if not kept:
        _silence_(layer, layer_map, config)
        return
    keep_rows_(layer, layer_map.heads_in, index)
    layer.set_submodule(layer_map.heads_out, slice_linear(output, index, dim=1))
    attention = layer.get_submodule(layer_map.attention)
    if layer_map.head_count is not None:
        setattr(attention, layer_map.head_count, len(kept))
    if layer_map.head_width is not None:
        setattr(attention, layer_map.head_width, len(index))
    if layer_map.head_bias is not None:
        _take_own_bias_(attention, layer_map.head_bias, kept)


def keep_neurons_(layer: nn.Module, layer_map: LayerMap, positions: Sequence[int], means: torch.Tensor | None = None) -> None:
    """Cuts an ordinary layer down to the FFN neurons at `positions`, counted among those that it has now.

    A layer that keeps none gets an explicit skip that equals masking: its FFN adds the bias of the second matrix only.

    Args:
        layer: The layer.
        layer_map: Where it keeps its neurons.
        positions: Which stay, ascending.
        means: Mean activation of the present neurons, shape (neurons,): what is cut leaves its own in the output bias.
    """
    output = layer.get_submodule(layer_map.neurons_out)
    if isinstance(output, BiasOnly) or len(positions) == output.weight.shape[1]:
        return
    index = torch.tensor(list(positions), dtype=torch.long)
    if means is not None:
        _absorb_(output, means, index)
    if not len(positions):
        for part in layer_map.neurons_in:
            layer.set_submodule(part.path, FirstColumns(part.blocks))
        layer.set_submodule(layer_map.neurons_out, BiasOnly(output.bias, output.weight.shape[0]))
        return
    keep_rows_(layer, layer_map.neurons_in, index)
    layer.set_submodule(layer_map.neurons_out, slice_linear(output, index, dim=1))


def add_output_biases_(layer: nn.Module, layer_map: LayerMap) -> bool:
    """Gives W_O and the second FFN matrix of an ordinary layer a bias of zeros each, where there is none.

    Returns:
        Whether one had none.
    """
    outputs = [layer.get_submodule(path) for path in (layer_map.heads_out, layer_map.neurons_out)]
    bare = [output for output in outputs if output.bias is None]
    like = next(layer.parameters())
    for output in bare:
        size = output.hidden_size if isinstance(output, BiasOnly) else output.weight.shape[0]
        output.bias = nn.Parameter(like.detach().new_zeros(size), requires_grad=like.requires_grad)
    return bool(bare)


@torch.no_grad()
def _absorb_(output: nn.Module, means: torch.Tensor, kept: torch.Tensor) -> None:
    """Adds to the bias of an output matrix what its other columns than `kept` contribute on average."""
    gone = torch.ones(len(means), dtype=torch.bool)
    gone[kept] = False
    weight = output.weight.double()
    shift = weight[:, gone.to(weight.device)] @ means[gone.to(means.device)].to(weight)
    output.bias = nn.Parameter((output.bias.double() + shift).to(output.bias), requires_grad=output.bias.requires_grad)


def keep_rows_(layer: nn.Module, parts: Sequence[Part], index: torch.Tensor) -> None:
    """Cuts the matrices of these parts down to some rows.

    Args:
        layer: The layer.
        parts: Parts of one or several matrices; those that the layer does not have are left out.
        index: The rows of each block that stay, shape (kept,).
    """
    for path in dict.fromkeys(part.path for part in parts if part.is_in(layer)):
        linear = layer.get_submodule(path)
        layer.set_submodule(path, slice_linear(linear, row_index(parts, path, linear.weight.shape[0], index), dim=0))


def _take_own_bias_(attention: nn.Module, name: str, kept: Sequence[int]) -> None:
    for hook in attention._forward_pre_hooks.values():
        if isinstance(hook, OwnBias):
            hook.heads = list(kept)
            return
    attention.register_forward_pre_hook(OwnBias(attention, name, kept), with_kwargs=True)


def _silence_(layer: nn.Module, layer_map: LayerMap, config: Any) -> None:
    attention, output = layer.get_submodule(layer_map.attention), layer.get_submodule(layer_map.heads_out)
    bias_only, prefix = BiasOnly(output.bias, output.weight.shape[0]), f"{layer_map.attention}."
    steps = {layer_map.heads_out.removeprefix(prefix): bias_only} if layer_map.output_is_inside else {}
    for path in (*layer_map.after_heads, *filter(None, (layer_map.residual_norm,))):
        steps[path.removeprefix(prefix)] = layer.get_submodule(path)
    norm = layer_map.residual_norm and layer_map.residual_norm.removeprefix(prefix)
    layer.set_submodule(layer_map.attention, SilentAttention(config, steps, norm).train(attention.training))
    if not layer_map.output_is_inside:
        layer.set_submodule(layer_map.heads_out, bias_only)
    # Transformers installs what captures attention maps once, at the first call that asks for them.
    layer.get_submodule(layer_map.attention)._forward_hooks.update(attention._forward_hooks)


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


def neurons_to_keep(plan: object, widths: Sequence[int], expert_layers: Sequence[int] = ()) -> list[list[int]] | None:
    """Reads the neurons of a plan for a model whose layers have FFNs of these widths.

    Args:
        plan: A `KeepPlan`, or the form of Transformers 4, which names none.
        widths: Per layer the neurons that are there.
        expert_layers: The layers that have no FFN of their own.

    Returns:
        Per layer the positions of the neurons that stay, ascending, counted among those that are there; None: all.

    Raises:
        ValueError: The plan is for other widths, or names neurons of an expert layer.
    """
    neurons = getattr(plan, "neurons", None)
    if neurons is None:
        return None
    for layer, (kept, planned, present) in enumerate(zip(neurons, plan.num_neurons, widths, strict=True)):
        if layer in expert_layers:
            if kept:
                raise ValueError(
                    f"`plan` keeps {len(kept)} neurons of layer {layer}, but that is an expert layer, which has no neurons: "
                    "leave its entry empty."
                )
        elif planned != present:
            raise ValueError(
                f"`plan` counts {planned} neurons in layer {layer}, but this model has {present} there: neurons are counted "
                "among those that the model has now, so make the plan from this model."
            )
    return [sorted(kept) for kept in neurons]
