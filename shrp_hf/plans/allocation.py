"""The best total value within a cost, one option from each of several menus: what a budget is spent on.

It knows neither models nor heads. A menu is what one part of a model may become: an attention with 0 to 12 heads, an FFN with
so many neurons, an expert layer with m experts, or a layer that is left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MAX_POINTS = 4096


@dataclass(frozen=True, eq=False)
class Menu:
    """The options of one part of a model, of which exactly one is taken.

    Args:
        costs: Cost of each option, shape (options,), 0 or more.
        values: Value of each, the same shape.

    Raises:
        ValueError: There is no option, the shapes differ, or a number is not finite.
    """

    costs: np.ndarray
    values: np.ndarray

    def __post_init__(self) -> None:
        for name in ("costs", "values"):
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=np.float64))
        if self.costs.ndim != 1 or self.costs.shape != self.values.shape or not self.costs.size:
            raise ValueError(
                f"`costs` and `values` must hold one number per option, at least one, got shapes {self.costs.shape} and "
                f"{self.values.shape}."
            )
        if not (np.isfinite(self.costs).all() and np.isfinite(self.values).all()) or (self.costs < 0).any():
            raise ValueError(f"`costs` must be finite and at least 0, `values` finite, got {self.costs} and {self.values}.")


class Frontier:
    """Every total that no other one beats in both cost and value, over all ways of taking one option per menu.

    Found menu by menu (dynamic programming, as ZipLM does, arXiv 2302.04089), with costs added up as they are. It is exact
    as long as there are at most `max_points` such totals after each menu. Where there are more, one is kept in each of
    `max_points` equal intervals of cost, the most valuable: what is chosen then fits its limit all the same, and is at
    least as good as the best choice for a limit that is lower by (menus / max_points) of the span of costs. Which totals
    are kept does not depend on a limit, so a higher limit is never worse.

    Args:
        menus: What is chosen from.
        max_points: Most totals that are kept after each menu.

    Raises:
        ValueError: There is no menu.
    """

    costs: np.ndarray
    values: np.ndarray

    def __init__(self, menus: Sequence[Menu], max_points: int = MAX_POINTS) -> None:
        if not menus:
            raise ValueError("`menus` must hold at least one menu, got none.")
        self._steps: list[tuple[np.ndarray, np.ndarray]] = []  # per menu: the total before, and the option taken
        costs, values = np.zeros(1), np.zeros(1)
        for menu in menus:
            options = _undominated(menu.costs, menu.values)
            all_costs = (costs[:, None] + menu.costs[options]).ravel()
            all_values = (values[:, None] + menu.values[options]).ravel()
            kept = _undominated(all_costs, all_values)
            if len(kept) > max_points:
                kept = kept[_best_of_intervals(all_costs[kept], max_points)]
            self._steps.append((kept // len(options), options[kept % len(options)]))
            costs, values = all_costs[kept], all_values[kept]
        self.costs, self.values = costs, values

    @property
    def least(self) -> float:
        """The lowest cost that can be reached."""
        return float(self.costs[0])

    def choose(self, limit: float) -> tuple[int, ...]:
        """Returns the option of each menu, whose values have the highest total within the limit.

        Args:
            limit: Highest total cost.

        Raises:
            ValueError: Nothing is that cheap.
        """
        point = int(np.searchsorted(self.costs, limit, side="right")) - 1
        if point < 0:
            raise ValueError(f"`limit` must be at least {self.least:g}, the lowest cost that can be reached, got {limit:g}.")
        chosen = []
        for before, options in reversed(self._steps):
            chosen.append(int(options[point]))
            point = int(before[point])
        return tuple(reversed(chosen))


def _undominated(costs: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Indices of the points that no other one beats, by ascending cost; of equal ones the first."""
    order = np.lexsort((-values, costs))
    best_before = np.maximum.accumulate(np.concatenate(([-np.inf], values[order][:-1])))
    return order[values[order] > best_before]


def _best_of_intervals(costs: np.ndarray, count: int) -> np.ndarray:
    """Indices of the dearest, which is the most valuable, of undominated points in each interval, and of the cheapest."""
    interval = np.minimum(((costs - costs[0]) / (costs[-1] - costs[0]) * (count - 1)).astype(np.int64), count - 2)
    is_last = np.append(interval[1:] != interval[:-1], True)
    is_last[0] = True
    return np.flatnonzero(is_last)
