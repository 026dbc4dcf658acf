"""Heads and neurons within one cost: what a budget that a table prices is spent on."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from shrp_hf.families import HeadLayout
from shrp_hf.measuring import CostTable
from shrp_hf.plans.allocation import Frontier, Menu
from shrp_hf.plans.keep_plan import KeepPlan

_ROUNDING = 1e-9  # of a limit: sums of the same costs in another order differ in their last bits


@dataclass(frozen=True)
class Spending:
    """What each layer of a model may become, and what that costs.

    Args:
        layout: The heads and neurons that the model has.
        table: What they cost.
        heads: Per layer, the numbers of heads that it may keep, ascending; a single one where there is no choice.
        neurons: The same of neurons.
        is_uniform: All layers with a choice keep as many of both.
    """

    layout: HeadLayout
    table: CostTable
    heads: tuple[tuple[int, ...], ...]
    neurons: tuple[tuple[int, ...], ...]
    is_uniform: bool = False

    @property
    def whole(self) -> float:
        """Cost of the model as it is."""
        attention, ffn = self._costs()
        return self._empty + sum(costs[-1] for costs in (*attention, *ffn))

    @property
    def least(self) -> float:
        """Cost of the cheapest model that may be chosen."""
        nothing = [np.zeros(len(counts)) for counts in self.heads], [np.zeros(len(counts)) for counts in self.neurons]
        return self._empty + self._frontier(*nothing).least

    def check(self, limit: float) -> None:
        """Refuses a limit that nothing can meet, which is known before anything is scored.

        Args:
            limit: Highest cost of the whole model.

        Raises:
            ValueError: Names the least that can be reached.
        """
        least = self.least
        if least > limit * (1 + _ROUNDING):
            whole, unit = self.whole, self.table.unit
            faster = f", a speed-up of {whole / least:.2f}x" if unit == "seconds" else ""
            raise ValueError(
                f"`budget` allows {_shown(limit, unit)}, {limit / whole:.1%} of the model as it is, but the least that can be "
                f"reached is {_shown(least, unit)}, {least / whole:.1%}{faster}: raise it, lower `min_heads_per_layer` or "
                "`min_neurons_per_layer`, or let neurons go too (`neurons=True`)."
            )

    def plan(self, limit: float, head_values: torch.Tensor, neuron_values: Sequence[torch.Tensor] | None) -> KeepPlan:
        """Returns the plan whose heads and neurons are worth most in all, within the limit.

        Args:
            limit: Highest cost of the whole model.
            head_values: What keeping a head is worth, shape (layers, heads).
            neuron_values: Per layer the same of its neurons, shape (neurons,); None keeps them all.

        Raises:
            ValueError: Nothing meets the limit.
        """
        self.check(limit)
        heads = [np.array([float(head_values[i, head]) for head in kept]) for i, kept in enumerate(self.layout.kept)]
        neurons = [np.zeros(count) for count in self.layout.num_neurons]
        if neuron_values is not None:
            neurons = [values.double().cpu().numpy() for values in neuron_values]
        worth = [
            [_worth(values, counts) for values, counts in zip(parts, options, strict=True)]
            for parts, options in ((heads, self.heads), (neurons, self.neurons))
        ]
        chosen = self._frontier(*worth).choose(limit * (1 + _ROUNDING) - self._empty)
        num_heads, num_neurons = self._counts(chosen)
        kept = [_best(values, count) for values, count in zip(heads, num_heads, strict=True)]
        named = tuple(tuple(present[i] for i in best) for present, best in zip(self.layout.kept, kept, strict=True))
        plan = KeepPlan(named, self.layout.num_heads)
        if neuron_values is None:
            return plan
        left = tuple(_best(values, count) for values, count in zip(neurons, num_neurons, strict=True))
        return plan.with_neurons(left, self.layout.num_neurons)

    @property
    def _empty(self) -> float:
        """Cost of what there is no choice about: all that is neither a head nor a neuron of an ordinary layer."""
        ordinary = self.layout.num_layers - len(self.layout.expert_layers)
        return self.table.total([(0, 0)] * ordinary, [len(self.layout.kept[i]) for i in self.layout.expert_layers])

    def _costs(self) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """What each option costs: per layer of its heads, and of its neurons."""
        table, experts = self.table, self.layout.expert_layers
        attention = [
            np.array([0.0 if i in experts else table.attention_of(count) for count in counts])
            for i, counts in enumerate(self.heads)
        ]
        return attention, [np.array([table.ffn_of(count) for count in counts]) for counts in self.neurons]

    def _frontier(self, heads: Sequence[np.ndarray], neurons: Sequence[np.ndarray]) -> Frontier:
        """All that is worth choosing, by what the options of each layer are worth."""
        attention, ffn = self._costs()
        if not self.is_uniform:
            each = zip((*attention, *ffn), (*heads, *neurons), strict=True)
            return Frontier([Menu(cost, values) for cost, values in each])
        rows = [self._options_of(pair) for pair in self._pairs]
        costs = [sum(c[o] for c, o in zip((*attention, *ffn), row, strict=True)) for row in rows]
        worth = [sum(v[o] for v, o in zip((*heads, *neurons), row, strict=True)) for row in rows]
        return Frontier([Menu(np.array(costs), np.array(worth))])

    def _counts(self, chosen: Sequence[int]) -> tuple[list[int], list[int]]:
        """Returns heads and neurons of each layer for the options that were chosen."""
        options = self._options_of(self._pairs[chosen[0]]) if self.is_uniform else chosen
        counts = [listed[option] for listed, option in zip((*self.heads, *self.neurons), options, strict=True)]
        return counts[: len(self.heads)], counts[len(self.heads) :]

    @property
    def _pairs(self) -> list[tuple[int, int]]:
        """(heads, neurons) of every layer alike."""
        heads, neurons = (sorted({count for counts in every for count in counts}) for every in (self.heads, self.neurons))
        return [(h, n) for h in heads for n in neurons]

    def _options_of(self, pair: tuple[int, int]) -> list[int]:
        """Per layer the option nearest below, of heads and then of neurons; the least where there is none."""
        wanted = [(counts, pair[0]) for counts in self.heads] + [(counts, pair[1]) for counts in self.neurons]
        return [max(bisect_right(counts, most) - 1, 0) for counts, most in wanted]


def _worth(values: np.ndarray, counts: Sequence[int]) -> np.ndarray:
    """What it is worth to keep the best so many, for each of `counts`."""
    return np.concatenate(([0.0], np.sort(np.nan_to_num(values))[::-1].cumsum()))[list(counts)]


def _best(values: np.ndarray, count: int) -> tuple[int, ...]:
    """Indices of the `count` largest values, ascending; of equal ones the first."""
    return tuple(sorted(np.argsort(-np.nan_to_num(values), kind="stable")[:count].tolist()))


def _shown(cost: float, unit: str) -> str:
    return f"{1e3 * cost:.3g} ms" if unit == "seconds" else f"{cost:,.0f} {unit}"
