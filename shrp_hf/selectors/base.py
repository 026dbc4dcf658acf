"""What all selectors share: score the heads, then spend the budget on them."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import torch
from transformers import PreTrainedModel

from shrp_hf.budget import Budget
from shrp_hf.families import HeadLayout, head_layout
from shrp_hf.head_stats import HeadStats, StatsRequest, collect_head_stats, scored_heads
from shrp_hf.plan import KeepPlan


def min_max(scores: torch.Tensor) -> torch.Tensor:
    """Scales to [0, 1] over all heads; NaN (no such head) stays, equal scores become 0."""
    known = scores[~scores.isnan()]
    span = known.max() - known.min()
    return (scores - known.min()) / (span if span > 0 else 1)


def telling(scores: torch.Tensor, what: str) -> torch.Tensor:
    """Returns the scores if they tell heads apart: finite, and not all 0; NaN (no such head) stays.

    Args:
        scores: Shape (layers, heads).
        what: What they are, for the message.

    Raises:
        ValueError: They do not.
    """
    known = scores[~scores.isnan()]
    if known.any() and known.isfinite().all():
        return scores
    found = "0" if known.isfinite().all() else "infinite"
    raise ValueError(
        f"The {what} of {'every head' if found == '0' else 'a head'} is {found}, which chooses nothing: check that the model "
        "has learned the task, that the batches carry its labels, and that some of them are hard enough to give a gradient; "
        "score in float32, or take a selector that needs no gradient (entropy, magnitude, random)."
    )


@dataclass(kw_only=True, eq=False)
class Selector(ABC):
    """Chooses the heads to keep; the model is left as it is.

    The budget counts the heads there is a choice about: `frozen_layers` and expert layers keep theirs on top of it.

    Args:
        budget: How many heads to keep.
        per_layer: Spread them evenly over the layers (what does not divide goes to the best of the next heads) instead
            of comparing all heads with each other.
        min_heads_per_layer: Heads that every layer keeps, its best ones; 0 allows layers without heads.
        frozen_layers: Layers that keep all their heads.

    Attributes:
        scores: After scoring, shape (layers, heads), float64, higher = keep; NaN where there is no choice.
        measured: Head count to measurement, of the last plan made to a measured budget.

    Raises:
        ValueError: The budget does not suit this selector, or an option is out of range.
    """

    name: ClassVar[str]
    budget_kinds: ClassVar[tuple[str, ...]] = ("heads", "fraction", "parameters", "flops", "latency", "quality")

    budget: Budget
    per_layer: bool = False
    min_heads_per_layer: int = 1
    frozen_layers: Sequence[int] = ()
    scores: torch.Tensor | None = field(init=False, default=None, repr=False)
    measured: dict[int, float] = field(init=False, default_factory=dict, repr=False)
    _model: "_Choice | None" = field(init=False, default=None, repr=False)

    def __post_init__(self) -> None:
        self._check_budget(self.budget)
        if not isinstance(self.min_heads_per_layer, int) or self.min_heads_per_layer < 0:
            raise ValueError(f"`min_heads_per_layer` must be a whole number from 0, got {self.min_heads_per_layer!r}.")

    @property
    def request(self) -> StatsRequest:
        """What has to be measured; requests of several selectors joined with ``|`` make one pass."""
        return StatsRequest()

    def select(
        self,
        model: PreTrainedModel,
        batches: Iterable[Mapping[str, torch.Tensor]] | None = None,
        *,
        stats: HeadStats | None = None,
        cache: str | Path | None = None,
    ) -> KeepPlan:
        """Scores the heads of `model` and returns the plan for the budget.

        Args:
            model: A supported encoder.
            batches: Calibration batches as a Transformers collator yields them; never the split that is reported.
            stats: Statistics of an earlier pass over them, instead of `batches`.
            cache: A file that keeps the statistics; see `collect_head_stats`.

        Raises:
            ValueError: See `collect_head_stats` and `plan`.
        """
        self.score(model, batches, stats=stats, cache=cache)
        return self.plan()

    def score(
        self,
        model: PreTrainedModel,
        batches: Iterable[Mapping[str, torch.Tensor]] | None = None,
        *,
        stats: HeadStats | None = None,
        cache: str | Path | None = None,
    ) -> torch.Tensor:
        """Scores the heads of `model` without choosing.

        Args:
            model: The model.
            batches: Calibration batches, as in `select`.
            stats: What was collected before, in their place.
            cache: Where to keep what is collected.

        Returns:
            Shape (layers, heads), higher = keep.

        Raises:
            ValueError: Neither `batches` nor `stats` are given to a selector that needs them, or they do not suit.
        """
        layout = head_layout(model)
        choice = self._choice(layout)
        if self.request != StatsRequest():
            if stats is None and batches is None:
                raise ValueError(f"`{type(self).__name__}` needs calibration data: give `batches` or `stats`.")
            if stats is None:
                stats = collect_head_stats(model, batches, self.request, cache=cache)
            if not stats.request.covers(self.request):
                raise ValueError(f"`stats` measured {stats.request}, but {type(self).__name__} needs {self.request}.")
            if stats.scored != scored_heads(layout):
                raise ValueError("`stats` are those of a model with other heads: score this model.")
        self.measured = {}
        self._model = replace(choice, parameters=sum(p.numel() for p in model.parameters()))
        try:
            self.scores = self._scored(model, stats)
        except ValueError:
            self._model = self.scores = None  # neither this model is scored nor an earlier one
            raise
        return self.scores

    def plan(self, budget: Budget | None = None) -> KeepPlan:
        """Returns the plan for a budget (by default the selector's own) from the scores there are.

        Raises:
            ValueError: Nothing was scored yet, or the budget does not suit, cannot be met or leaves too few heads.
        """
        budget = self.budget if budget is None else budget
        self._check_budget(budget)
        choice = self._scored_choice()
        if not budget.is_measured:
            return self.keep(self._count(budget))
        if budget.kind == "parameters":
            budget = replace(budget, measure=choice.parameters_of)
        count, self.measured = budget.search(self.keep, self._fewest(), choice.available)
        return self.keep(count)

    def keep(self, count: int) -> KeepPlan:
        """Returns the plan that keeps the best `count` heads.

        Raises:
            ValueError: There are not that many, or it is too few for `min_heads_per_layer`.
        """
        choice = self._scored_choice()
        self._check_count(count)
        ranked = []
        for layer, heads in enumerate(choice.open):
            best_first = sorted((-float(self.scores[layer, head]), head) for head in heads)
            for rank, (cost, head) in enumerate(best_first):
                ranked.append((rank if self.per_layer else rank >= self.min_heads_per_layer, cost, layer, head))
        return choice.plan([(layer, head) for *_, layer, head in sorted(ranked)[:count]])

    @abstractmethod
    def _scored(self, model: PreTrainedModel, stats: HeadStats | None) -> torch.Tensor:
        """Returns the scores, shape (layers, heads)."""

    def _count(self, budget: Budget) -> int:
        return budget.count(self._scored_choice().available)

    def _heads_with_choice(self, layout: HeadLayout) -> tuple[tuple[int, ...], ...]:
        return scored_heads(layout)

    def _choice(self, layout: HeadLayout) -> "_Choice":
        heads = self._heads_with_choice(layout)
        for layer in self.frozen_layers:
            if not isinstance(layer, int) or not 0 <= layer < layout.num_layers:
                raise ValueError(
                    f"`frozen_layers` names layer {layer!r}, but the model's layers are 0 to {layout.num_layers - 1}."
                )
        open_heads = tuple(() if i in self.frozen_layers else layer for i, layer in enumerate(heads))
        if not any(open_heads):
            raise ValueError(f"`frozen_layers` {list(self.frozen_layers)} leave no head to choose.")
        return _Choice(layout, open_heads)

    def _scored_choice(self) -> "_Choice":
        if self._model is None:
            raise ValueError("Nothing is scored yet: call `select` or `score` with a model first.")
        return self._model

    def _fewest(self) -> int:
        return max(1, sum(min(self.min_heads_per_layer, len(heads)) for heads in self._scored_choice().open))

    def _check_count(self, count: int) -> None:
        fewest, available = self._fewest(), self._scored_choice().available
        if not fewest <= count <= available:
            raise ValueError(
                f"`budget` keeps {count} heads, but `min_heads_per_layer={self.min_heads_per_layer}` and the "
                f"{available} heads to choose from allow {fewest} to {available}."
            )

    def _check_budget(self, budget: Budget) -> None:
        if not isinstance(budget, Budget):
            raise ValueError(f"`budget` must be a Budget, such as Budget.fraction(0.5), got {budget!r}.")
        is_measured_knee = budget.kind == "knee" and budget.is_measured
        if budget.kind not in self.budget_kinds and not is_measured_knee:
            known = ", ".join(f"Budget.{kind}" for kind in self.budget_kinds)
            hint = " (a knee of measured quality, Budget.knee(evaluate=...), suits all)" if budget.kind == "knee" else ""
            raise ValueError(f"{type(self).__name__} does not take Budget.{budget.kind}: it takes {known}{hint}.")


@dataclass(frozen=True)
class _Choice:
    """The heads of a model that there is a choice about."""

    layout: HeadLayout
    open: tuple[tuple[int, ...], ...]
    parameters: int = 0

    @property
    def available(self) -> int:
        """Number of heads to choose from."""
        return sum(map(len, self.open))

    @property
    def rows(self) -> list[tuple[int, int]]:
        """(layer, head) of every head to choose from."""
        return [(layer, head) for layer, heads in enumerate(self.open) for head in heads]

    def plan(self, chosen: Iterable[tuple[int, int]]) -> KeepPlan:
        """Returns the plan that keeps the chosen (layer, head), and all that there is no choice about."""
        kept = [set(heads) - set(free) for heads, free in zip(self.layout.kept, self.open, strict=True)]
        for layer, head in chosen:
            kept[layer].add(head)
        return KeepPlan(kept=tuple(tuple(sorted(heads)) for heads in kept), num_heads=self.layout.num_heads)

    def parameters_of(self, plan: KeepPlan) -> int:
        """Returns the parameters of the whole model after cutting it by `plan`."""
        gone = [len(now) - len(then) for now, then in zip(self.layout.kept, plan.kept, strict=True)]
        return self.parameters - sum(n * self.layout.head_parameters(layer) for layer, n in enumerate(gone) if n)
