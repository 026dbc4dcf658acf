"""What all selectors share: score heads, and neurons where they may go, then spend the budget on them."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import torch
from transformers import PreTrainedModel

from shrp_hf.defaults import MIN_HEADS_PER_LAYER
from shrp_hf.families import HeadLayout, head_layout
from shrp_hf.measuring import CostTable, flop_table, latency_table, parameter_table
from shrp_hf.measuring.latency import NEURON_STEP, warn_of_another_machine
from shrp_hf.plans.budget import Budget
from shrp_hf.plans.keep_plan import KeepPlan
from shrp_hf.pruning import to_shrp
from shrp_hf.scoring import HeadStats, StatsRequest, collect_head_stats, scored_heads
from shrp_hf.selectors.spending import Spending


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
    """Chooses the heads to keep, and the FFN neurons where they may go too; the model is left as it is.

    A count in the budget is of the heads there is a choice about: `frozen_layers` and expert layers keep theirs on top of
    it. A share of parameters, FLOPs or time is of the whole model; what is kept within it is worth most in all, by the sum
    of what each head and each neuron is worth (`Spending`).

    Args:
        budget: What to keep.
        neurons: Whether FFN neurons may go too. None: where a table of costs prices the budget (`Budget.speedup`, and
            `Budget.latency` and `Budget.flops` without a measurement of your own).
        per_layer: Spread them evenly over the layers (what does not divide goes to the best of the next heads) instead
            of comparing all heads with each other. With neurons: all layers keep as many of both.
        min_heads_per_layer: Heads that every layer keeps, its best ones; 0 allows layers without heads.
        min_neurons_per_layer: The same of neurons, rounded up to a width.
        neuron_step: FFN widths are multiples of this, or the width that the layer has. None: 32, at which hardware is fast, or
            an eighth of the unpruned width where that is less.
        frozen_layers: Layers that keep all their heads and neurons.

    Attributes:
        scores: After scoring, shape (layers, heads), float64, higher = keep; NaN where there is no choice.
        neuron_scores: Per layer the same of its neurons, shape (neurons,); None where they all stay.
        measured: Head count to measurement, of the last plan made to a measured budget.

    Raises:
        ValueError: The budget does not suit this selector, or an option is out of range.
    """

    name: ClassVar[str]
    budget_kinds: ClassVar[tuple[str, ...]] = ("heads", "fraction", "parameters", "flops", "latency", "quality")
    takes_neurons: ClassVar[bool] = True
    scores_neurons_by_data: ClassVar[bool] = True

    budget: Budget
    neurons: bool | None = None
    per_layer: bool = False
    min_heads_per_layer: int = MIN_HEADS_PER_LAYER
    min_neurons_per_layer: int = 1
    neuron_step: int | None = None
    frozen_layers: Sequence[int] = ()
    scores: torch.Tensor | None = field(init=False, default=None, repr=False)
    neuron_scores: Sequence[torch.Tensor] | None = field(init=False, default=None, repr=False)
    measured: dict[int, float] = field(init=False, default_factory=dict, repr=False)
    _model: "_Choice | None" = field(init=False, default=None, repr=False)
    _tables: dict[tuple, CostTable] = field(init=False, default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self._check_budget(self.budget)
        for name, least in (("min_heads_per_layer", 0), ("min_neurons_per_layer", 0), ("neuron_step", 1)):
            value = getattr(self, name)
            if not (value is None and name == "neuron_step") and (not isinstance(value, int) or value < least):
                raise ValueError(f"`{name}` must be a whole number from {least}, got {value!r}.")

    @property
    def request(self) -> StatsRequest:
        """What has to be measured; requests of several selectors joined with ``|`` make one pass."""
        needs_neurons = self._chooses_neurons(self.budget) and self.scores_neurons_by_data
        return self._request | StatsRequest(neurons=True) if needs_neurons else self._request

    @property
    def _request(self) -> StatsRequest:
        """What has to be measured of heads."""
        return StatsRequest()

    def select(
        self,
        model: PreTrainedModel,
        batches: Iterable[Mapping[str, torch.Tensor]] | None = None,
        *,
        stats: HeadStats | None = None,
        cache: str | Path | None = None,
    ) -> KeepPlan:
        """Scores the heads of `model`, and its neurons where they may go, and returns the plan for the budget.

        A budget that the model cannot meet is refused before anything is scored. The table of `Budget.latency` and
        `Budget.speedup` is measured first, unless there is one.

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

    def check(self, model: PreTrainedModel) -> None:
        """Refuses a budget that `model` cannot meet, as `select` and `score` do before they score anything.

        Args:
            model: The model.

        Raises:
            ValueError: Nothing is that cheap (the error names what is), or the model leaves nothing to choose.
        """
        self._checked_choice(model)

    def least_share(self, model: PreTrainedModel) -> float:
        """Returns the smallest share of its cost that `model` can be cut to, whatever its scores.

        Args:
            model: The model; its cost is what the budget is about (time, FLOPs, or parameters where neurons may go).

        Raises:
            ValueError: The budget is not about a cost, or the model leaves nothing to choose.
        """
        if not self._is_priced(self.budget):
            raise ValueError(f"Budget.{self.budget.kind} is about no cost of heads and neurons: take Budget.speedup or flops.")
        self._tables = {}
        spending, _ = self._spending(replace(self._choice(head_layout(model)), model=model), self.budget)
        return spending.least / spending.whole

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
        choice = self._checked_choice(model)
        if self.request != StatsRequest():
            if stats is None and batches is None:
                raise ValueError(f"`{type(self).__name__}` needs calibration data: give `batches` or `stats`.")
            if stats is None:
                stats = collect_head_stats(model, batches, self.request, cache=cache)
            if not stats.request.covers(self.request):
                raise ValueError(f"`stats` measured {stats.request}, but {type(self).__name__} needs {self.request}.")
            if stats.scored != scored_heads(choice.layout):
                raise ValueError("`stats` are those of a model with other heads: score this model.")
            if self.request.neurons and stats.widths != choice.layout.num_neurons:
                raise ValueError("`stats` are those of a model with other neurons: score this model.")
        self.measured = {}
        self._model = choice
        try:
            self.scores = self._scored(model, stats)
            self.neuron_scores = self._scored_neurons(model, stats) if self._chooses_neurons(self.budget) else None
        except ValueError:
            self._model = self.scores = self.neuron_scores = None  # neither this model is scored nor an earlier one
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
        if self._chooses_neurons(budget) and self.neuron_scores is None:
            raise ValueError("Neurons were not scored, because the selector's own budget keeps them: give it `neurons=True`.")
        if self._is_priced(budget):
            spending, limit = self._spending(choice, budget)
            heads, neurons = self._worth(self._chooses_neurons(budget))
            return spending.plan(limit, heads, neurons)
        if not budget.is_measured:
            plan = self.keep(self._count(budget))
            return self._with_share_of_neurons(plan, budget) if self._chooses_neurons(budget) else plan
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

    def _scored_neurons(self, model: PreTrainedModel, stats: HeadStats | None) -> Sequence[torch.Tensor]:
        """Returns the scores of neurons, per layer shape (neurons,)."""
        return stats.neuron_importance()

    def _worth(self, with_neurons: bool) -> tuple[torch.Tensor, Sequence[torch.Tensor] | None]:
        """What keeping each head and each neuron is worth, on one scale.

        By default the scores as shares: all heads are worth as much as all neurons.
        """
        heads = self.scores / self.scores.nansum()
        if not with_neurons:
            return heads, None
        total = sum(scores.sum() for scores in self.neuron_scores)
        return heads, [scores / total for scores in self.neuron_scores]

    def _chooses_neurons(self, budget: Budget) -> bool:
        return budget.is_tabled if self.neurons is None else self.neurons

    def _is_priced(self, budget: Budget) -> bool:
        """Whether a table of costs says what fits."""
        return budget.is_tabled or (budget.kind == "parameters" and self._chooses_neurons(budget))

    def _checked_choice(self, model: PreTrainedModel) -> "_Choice":
        """What there is to choose of a model that can meet the budget."""
        choice = replace(self._choice(head_layout(model)), model=model)
        self._tables = {}
        if self._chooses_neurons(self.budget) and not any(choice.layout.num_neurons):
            raise ValueError("`model` has no FFN neurons left to choose: give the selector `neurons=False`.")
        if self._is_priced(self.budget):
            spending, limit = self._spending(choice, self.budget)
            warn_of_another_machine(spending.table)
            spending.check(limit)
        return choice

    def _spending(self, choice: "_Choice", budget: Budget) -> tuple[Spending, float]:
        """What the budget may be spent on, and its limit."""
        table, key = budget.table, (budget.kind, budget.at)
        if table is None:
            if key not in self._tables:
                self._tables[key] = _table(choice.model, budget)
            table = self._tables[key]
        spending = self._options(choice, table, self._chooses_neurons(budget))
        return spending, budget.target if budget.target is not None else budget.keep * spending.whole

    def _options(self, choice: "_Choice", table: CostTable, with_neurons: bool, with_heads: bool = True) -> Spending:
        layout = choice.layout
        step = self.neuron_step or max(1, min(NEURON_STEP, to_shrp(choice.model).config.ffn_width // 8))
        heads, neurons = [], []
        for i, kept in enumerate(layout.kept):
            least = min(self.min_heads_per_layer, len(kept))
            heads.append(range(least, len(kept) + 1) if choice.open[i] and with_heads else (len(kept),))
            width = layout.num_neurons[i]
            is_free = with_neurons and i not in self.frozen_layers
            least = min(self.min_neurons_per_layer, width)
            widths = [count for count in range(0, width, step) if count >= least] if is_free else []
            neurons.append((*widths, width))
        return Spending(layout, table, tuple(map(tuple, heads)), tuple(neurons), is_uniform=self.per_layer)

    def _with_share_of_neurons(self, plan: KeepPlan, budget: Budget) -> KeepPlan:
        """Adds the neurons that are worth most, as large a share of them as of the heads."""
        choice = self._scored_choice()
        most = max(choice.layout.num_neurons)
        table = CostTable("neurons", 0, 0, (0, choice.layout.num_heads), (0, 0), (0, most), (0, most))
        spending = self._options(choice, table, with_neurons=True, with_heads=False)
        spent = spending.plan(budget.target * spending.whole, *self._worth(with_neurons=True))
        return plan.with_neurons(spent.neurons, spent.num_neurons)

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
        if not self._chooses_neurons(budget):
            return
        if not self.takes_neurons:
            raise ValueError(
                f"{type(self).__name__} scores no neurons: leave `neurons` out and give the budget a measurement "
                "(`Budget.latency(measure, ...)`), or take HisSelector."
            )
        if not budget.is_tabled and budget.kind not in ("parameters", "fraction"):
            raise ValueError(
                f"`neurons=True` needs a budget that says how many neurons stay, which Budget.{budget.kind} does not: take "
                "Budget.speedup, latency or flops (without a measurement), parameters or fraction."
            )


def _table(model: PreTrainedModel, budget: Budget) -> CostTable:
    """What heads and neurons cost, by the kind of budget."""
    if budget.kind == "parameters":
        return parameter_table(model)
    return flop_table(model, budget.at) if budget.kind == "flops" else latency_table(model, budget.at)


@dataclass(frozen=True)
class _Choice:
    """The heads of a model that there is a choice about."""

    layout: HeadLayout
    open: tuple[tuple[int, ...], ...]
    model: PreTrainedModel | None = None

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
        whole = sum(parameter.numel() for parameter in self.model.parameters())
        return whole - sum(n * self.layout.head_parameters(layer) for layer, n in enumerate(gone) if n)
