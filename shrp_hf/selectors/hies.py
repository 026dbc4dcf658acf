"""HIES: head importance and attention entropy in one score (arXiv 2510.13832)."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from transformers import PreTrainedModel

from shrp_hf.plans.budget import Budget
from shrp_hf.plans.keep_plan import KeepPlan
from shrp_hf.scoring import HeadStats, StatsRequest
from shrp_hf.selectors.base import min_max
from shrp_hf.selectors.baselines import HisSelector


@dataclass(kw_only=True, eq=False)
class HiesSelector(HisSelector):
    """Keeps the heads with the largest HIES = alpha HIS + (1 - alpha) (1 - AE), both min-max scaled over all heads.

    An appendix of the paper prints + (1 - alpha) AE, against its own prose, which we follow. The paper keeps no
    minimum per layer (`min_heads_per_layer=0`) and tunes alpha per task and ratio; the default of 0.5 is ours.

    Args:
        alpha: Weight of the importance, in [0, 1), or "search".
        evaluate: For the search: takes a plan, returns its quality on a split held out from what is reported.
        grid: Values of alpha that are searched; the first of equally good ones wins.

    Attributes:
        best_alpha: The alpha of the last plan.
        alpha_curve: Alpha to quality, of the last search.

    Raises:
        ValueError: Alpha is out of range, a search has nothing to evaluate with, or its budget has no fixed count.
    """

    name: ClassVar[str] = "hies"
    alpha: float | str = 0.5
    evaluate: Callable[[KeepPlan], float] | None = None
    grid: Sequence[float] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    best_alpha: float | None = field(init=False, default=None)
    alpha_curve: dict[float, float] = field(init=False, default_factory=dict, repr=False)
    _parts: tuple[torch.Tensor, torch.Tensor] | None = field(init=False, default=None, repr=False)
    _total: float = field(init=False, default=1.0, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha == "search" and not (callable(self.evaluate) and len(self.grid)):
            raise ValueError('`alpha="search"` needs `evaluate`, a callable that takes a plan and returns its quality.')
        for alpha in self.grid if self.alpha == "search" else (self.alpha,):
            if isinstance(alpha, str | bool) or not 0 <= alpha < 1:
                raise ValueError(f'`alpha` must be in [0, 1) or "search", got {alpha!r}.')

    @property
    def _request(self) -> StatsRequest:
        """Head importance and attention entropy."""
        return StatsRequest(importance=True, entropy=True)

    def plan(self, budget: Budget | None = None) -> KeepPlan:
        """Returns the plan for a budget, of the alpha given or of the best one found.

        Raises:
            ValueError: See `Selector.plan`; or alpha is searched under a budget that itself searches for quality.
        """
        if self.alpha != "search":
            return super().plan(budget)
        kind = (budget or self.budget).kind
        if kind in ("quality", "knee"):
            raise ValueError(f'`alpha="search"` compares plans of one size, which Budget.{kind} does not fix: give alpha.')
        self._scored_choice()
        self.alpha_curve, plans = {}, {}
        for alpha in self.grid:
            self._set_alpha(alpha)
            plans[alpha] = super().plan(budget)
            self.alpha_curve[alpha] = float(self.evaluate(plans[alpha]))
        known = {alpha: quality for alpha, quality in self.alpha_curve.items() if not math.isnan(quality)}
        if not known:
            raise ValueError(f"`evaluate` gives NaN for every alpha of `grid` {tuple(self.grid)}: give alpha, or more heads.")
        best = max(known, key=known.__getitem__)
        self._set_alpha(best)
        return plans[best]

    def _scored(self, model: PreTrainedModel, stats: HeadStats) -> torch.Tensor:
        importance = super()._scored(model, stats)
        self._total = float(importance.nansum())
        self._parts = min_max(importance), 1 - min_max(stats.entropy())
        return self._set_alpha(self.grid[0] if isinstance(self.alpha, str) else self.alpha)

    def _worth(self, with_neurons: bool) -> tuple[torch.Tensor, Sequence[torch.Tensor] | None]:
        """Beside neurons, whose score is an importance, all heads together are worth their importance, divided by HIES."""
        if self.per_layer_normalisation:
            return super()._worth(with_neurons)
        return self.scores / self.scores.nansum() * self._total, self.neuron_scores if with_neurons else None

    def _set_alpha(self, alpha: float) -> torch.Tensor:
        importance, focus = self._parts
        self.best_alpha = alpha
        self.scores = alpha * importance + (1 - alpha) * focus
        return self.scores
