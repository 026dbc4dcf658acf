"""Tables that are counted: parameters and FLOPs by heads and neurons."""

import copy

import torch
from transformers import PreTrainedModel

from shrp_hf.families import HeadLayout, head_layout
from shrp_hf.measuring.cost import count_flops
from shrp_hf.measuring.cost_table import CostTable
from shrp_hf.plans.budget import Serving
from shrp_hf.plans.keep_plan import KeepPlan
from shrp_hf.pruning import prune_heads


def parameter_table(model: PreTrainedModel) -> CostTable:
    """Counts the parameters of a head, of a neuron, and of everything else, task head and expert layers included.

    Args:
        model: A supported encoder.

    Raises:
        ValueError: The family is not supported.
    """
    layout = head_layout(model)
    head = layout.head_parameters(layout.ordinary_layers[0]) if layout.ordinary_layers else 0
    neuron = layout.neuron_parameters(layout.ffn_layers[0]) if layout.ffn_layers else 0
    return _linear("parameters", layout, sum(p.numel() for p in model.parameters()), head, neuron)


def flop_table(model: PreTrainedModel, at: Serving | None = None) -> CostTable:
    """Counts the FLOPs of a head, of a neuron, and of everything else; a multiply-add is 2.

    A head's are those that the model has more than without one of its heads: whatever a family computes per head is in it.

    Args:
        model: A supported encoder on any device; nothing is computed.
        at: Batch and length; None: 8 x 128.

    Raises:
        ValueError: The family is not supported, or the shape does not suit the model.
    """
    at = Serving() if at is None else at
    with torch.device("meta"):
        shape = copy.deepcopy(model).to("meta")
    layout = head_layout(shape)
    whole = count_flops(shape, at.batch_size, at.length)

    def less(plan: KeepPlan) -> int:
        return whole - count_flops(prune_heads(shape, plan), at.batch_size, at.length)

    head = neuron = 0
    if layout.ordinary_layers:
        layer = layout.ordinary_layers[0]
        kept = [heads[1:] if i == layer else heads for i, heads in enumerate(layout.kept)]
        head = less(KeepPlan(tuple(kept), layout.num_heads))
    if layout.ffn_layers:
        layer = layout.ffn_layers[0]
        left = [tuple(range(int(i == layer), count)) for i, count in enumerate(layout.num_neurons)]
        neuron = less(KeepPlan(layout.kept, layout.num_heads, tuple(left), layout.num_neurons))
    return _linear("FLOPs", layout, whole, head, neuron)


def _linear(unit: str, layout: HeadLayout, whole: int, head: int, neuron: int) -> CostTable:
    """A table in which every head costs the same, and every neuron."""
    ordinary = [i for i in range(layout.num_layers) if i not in layout.expert_layers]
    heads = max((len(layout.kept[i]) for i in ordinary), default=0)
    neurons = max(layout.num_neurons)
    fixed = whole - sum(head * len(layout.kept[i]) + neuron * layout.num_neurons[i] for i in ordinary)
    (num_heads, attention), (num_neurons, ffn) = _line(heads, head), _line(neurons, neuron)
    return CostTable(unit, fixed, 0, num_heads, attention, num_neurons, ffn)


def _line(most: int, each: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Counts from 0 to `most`, and what they cost; 0 alone where there are none."""
    return ((0, most), (0, each * most)) if most else ((0,), (0,))
