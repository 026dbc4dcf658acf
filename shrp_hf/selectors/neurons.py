"""Which FFN neurons stay: the best by a score, as many in every layer or wherever they are."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from transformers import PreTrainedModel

from shrp_hf.families import HeadLayout, head_layout
from shrp_hf.plans.keep_plan import KeepPlan
from shrp_hf.scoring import HeadStats, StatsRequest, collect_head_stats, neuron_magnitude


@dataclass(kw_only=True, eq=False)
class NeuronSelector(ABC):
    """Chooses the neurons to keep; the model is left as it is. Heads are chosen by another selector, whose plan it completes.

    Args:
        keep: Share of the neurons that stay, 0 to 1, of those there is a choice about.
        per_layer: The same share in every layer, instead of comparing all neurons with each other.
        multiple_of: Widths are rounded to the nearest multiple of this (32 suits most hardware); a layer never gets more than
            it has.
        frozen_layers: Layers that keep all their neurons.

    Attributes:
        scores: After scoring, per layer shape (neurons,), float64, higher = keep; empty where a layer has none.

    Raises:
        ValueError: An option is out of range.

    Example:
        >>> selector = NeuronImportanceSelector(keep=0.5)
        >>> plan = selector.select(model, batches, plan=head_selector.select(model, batches))  # doctest: +SKIP
    """

    name: ClassVar[str]

    keep: float
    per_layer: bool = True
    multiple_of: int = 1
    frozen_layers: Sequence[int] = ()
    scores: tuple[torch.Tensor, ...] | None = field(init=False, default=None, repr=False)
    _layout: HeadLayout | None = field(init=False, default=None, repr=False)

    def __post_init__(self) -> None:
        if isinstance(self.keep, bool) or not isinstance(self.keep, int | float) or not 0 <= self.keep <= 1:
            raise ValueError(f"`keep` must be a share from 0 to 1, got {self.keep!r}.")
        if not isinstance(self.multiple_of, int) or isinstance(self.multiple_of, bool) or self.multiple_of < 1:
            raise ValueError(f"`multiple_of` must be a whole number from 1, got {self.multiple_of!r}.")

    @property
    def request(self) -> StatsRequest:
        """What has to be measured; joined with those of other selectors by ``|`` it makes one pass."""
        return StatsRequest()

    def select(
        self,
        model: PreTrainedModel,
        batches: Iterable[Mapping[str, torch.Tensor]] | None = None,
        *,
        stats: HeadStats | None = None,
        cache: str | Path | None = None,
        plan: KeepPlan | None = None,
    ) -> KeepPlan:
        """Scores the neurons of `model` and returns a plan that keeps the best.

        Args:
            model: A supported encoder.
            batches: Calibration batches as a Transformers collator yields them; never the split that is reported.
            stats: Statistics of an earlier pass over them, instead of `batches`.
            cache: A file that keeps the statistics; see `collect_head_stats`.
            plan: Whose heads stay; None: all.

        Raises:
            ValueError: See `score` and `plan`.
        """
        self.score(model, batches, stats=stats, cache=cache)
        return self.plan(plan)

    def score(
        self,
        model: PreTrainedModel,
        batches: Iterable[Mapping[str, torch.Tensor]] | None = None,
        *,
        stats: HeadStats | None = None,
        cache: str | Path | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """Scores the neurons of `model` without choosing.

        Args:
            model: The model.
            batches: Calibration batches, as in `select`.
            stats: What was collected before, in their place.
            cache: Where to keep what is collected.

        Returns:
            Per layer shape (neurons,), higher = keep.

        Raises:
            ValueError: Neither `batches` nor `stats` are given to a selector that needs them, they do not suit, or there is no
                neuron to choose.
        """
        layout = head_layout(model)
        for layer in self.frozen_layers:
            if not isinstance(layer, int) or not 0 <= layer < layout.num_layers:
                raise ValueError(
                    f"`frozen_layers` names layer {layer!r}, but the model's layers are 0 to {layout.num_layers - 1}."
                )
        if not set(layout.ffn_layers) - set(self.frozen_layers):
            raise ValueError(f"`frozen_layers` {list(self.frozen_layers)} leave no neuron to choose.")
        if self.request != StatsRequest():
            if stats is None and batches is None:
                raise ValueError(f"`{type(self).__name__}` needs calibration data: give `batches` or `stats`.")
            if stats is None:
                stats = collect_head_stats(model, batches, self.request, cache=cache)
            if not stats.request.covers(self.request):
                raise ValueError(f"`stats` measured {stats.request}, but {type(self).__name__} needs {self.request}.")
            if stats.widths != layout.num_neurons:
                raise ValueError("`stats` are those of a model with other neurons: score this model.")
        self._layout, self.scores = layout, self._scored(model, stats)
        return self.scores

    def plan(self, plan: KeepPlan | None = None) -> KeepPlan:
        """Returns a plan with the best neurons of the model last scored.

        Args:
            plan: Whose heads stay; None: all that the model has.

        Raises:
            ValueError: Nothing was scored yet, or `plan` is for a model of another shape.
        """
        if self._layout is None or self.scores is None:
            raise ValueError("Nothing is scored yet: call `select` or `score` with a model first.")
        layout = self._layout
        plan = KeepPlan(layout.kept, layout.num_heads) if plan is None else plan
        if (plan.num_layers, plan.num_heads) != (layout.num_layers, layout.num_heads):
            raise ValueError(
                f"`plan` is for {plan.num_layers} layers of {plan.num_heads} heads, but the model that was scored has "
                f"{layout.num_layers} layers of {layout.num_heads} heads."
            )
        neurons = [tuple(range(count)) for count in layout.num_neurons]
        for layer, count in self._counts(layout).items():
            best = self.scores[layer].sort(descending=True, stable=True).indices[:count]
            neurons[layer] = tuple(sorted(best.tolist()))
        return plan.with_neurons(neurons, layout.num_neurons)

    def _counts(self, layout: HeadLayout) -> dict[int, int]:
        """Neurons that each layer keeps, of those layers that there is a choice about."""
        widths = {i: layout.num_neurons[i] for i in layout.ffn_layers if i not in self.frozen_layers}
        shares = {i: self.keep * width for i, width in widths.items()}
        if not self.per_layer:
            layers = torch.cat([torch.full((width,), i) for i, width in widths.items()])
            ranked = layers[torch.cat([self.scores[i] for i in widths]).sort(descending=True, stable=True).indices]
            kept = ranked[: round(self.keep * len(ranked))].tolist()
            shares = {i: kept.count(i) for i in widths}
        return {i: min(widths[i], self.multiple_of * round(share / self.multiple_of)) for i, share in shares.items()}

    @abstractmethod
    def _scored(self, model: PreTrainedModel, stats: HeadStats | None) -> tuple[torch.Tensor, ...]:
        """Returns the scores."""


@dataclass(kw_only=True, eq=False)
class NeuronImportanceSelector(NeuronSelector):
    """Keeps the neurons whose mask the loss reacts to most: mean over samples of |sum over tokens of output x gradient|."""

    name: ClassVar[str] = "importance"

    @property
    def request(self) -> StatsRequest:
        """Importance of the neurons."""
        return StatsRequest(neurons=True)

    def _scored(self, model: PreTrainedModel, stats: HeadStats) -> tuple[torch.Tensor, ...]:
        return stats.neuron_importance()


@dataclass(kw_only=True, eq=False)
class NeuronMagnitudeSelector(NeuronSelector):
    """Keeps the neurons with the largest weights (L2 norm over its rows and its column)."""

    name: ClassVar[str] = "magnitude"

    def _scored(self, model: PreTrainedModel, stats: HeadStats | None) -> tuple[torch.Tensor, ...]:
        return neuron_magnitude(model)


@dataclass(kw_only=True, eq=False)
class NeuronRandomSelector(NeuronSelector):
    """Keeps random neurons: the control that a method has to beat.

    Args:
        seed: Of the draw.
    """

    name: ClassVar[str] = "random"
    seed: int = 0

    def _scored(self, model: PreTrainedModel, stats: HeadStats | None) -> tuple[torch.Tensor, ...]:
        generator = torch.Generator().manual_seed(self.seed)
        widths = head_layout(model).num_neurons
        return tuple(torch.rand(width, generator=generator, dtype=torch.float64) for width in widths)
