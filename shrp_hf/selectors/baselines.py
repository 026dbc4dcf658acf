"""The selectors that every comparison carries, and usage, by which SHRP chooses its experts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from transformers import PreTrainedModel

from shrp_hf.defaults import SEED
from shrp_hf.families import HeadLayout
from shrp_hf.scoring import GRANULARITIES, HeadStats, StatsRequest, neuron_magnitude, weight_magnitude
from shrp_hf.selectors.base import Selector, telling


@dataclass(kw_only=True, eq=False)
class RandomSelector(Selector):
    """Keeps random heads and neurons: the control that a method has to beat.

    Args:
        seed: Of the draw.
    """

    name: ClassVar[str] = "random"
    scores_neurons_by_data: ClassVar[bool] = False
    seed: int = SEED

    def _scored(self, model: PreTrainedModel, stats: HeadStats | None) -> torch.Tensor:
        choice = self._scored_choice()
        shape = (choice.layout.num_layers, choice.layout.num_heads)
        drawn = torch.rand(shape, generator=torch.Generator().manual_seed(self.seed), dtype=torch.float64)
        scores = torch.full_like(drawn, torch.nan)
        for row in choice.rows:
            scores[row] = drawn[row]
        return scores

    def _scored_neurons(self, model: PreTrainedModel, stats: HeadStats | None) -> tuple[torch.Tensor, ...]:
        generator = torch.Generator().manual_seed(self.seed)
        widths = self._scored_choice().layout.num_neurons
        return tuple(torch.rand(width, generator=generator, dtype=torch.float64) for width in widths)


@dataclass(kw_only=True, eq=False)
class MagnitudeSelector(Selector):
    """Keeps the heads with the largest weights (L2 norm over query, key, value and output), and such neurons."""

    name: ClassVar[str] = "magnitude"
    scores_neurons_by_data: ClassVar[bool] = False

    def _scored(self, model: PreTrainedModel, stats: HeadStats | None) -> torch.Tensor:
        return telling(weight_magnitude(model), "weight magnitude")

    def _scored_neurons(self, model: PreTrainedModel, stats: HeadStats | None) -> tuple[torch.Tensor, ...]:
        return neuron_magnitude(model)


@dataclass(kw_only=True, eq=False)
class EntropySelector(Selector):
    """Keeps the heads whose attention is most focused: 1 - AE, AE as in HIES (arXiv 2510.13832).

    This is the entropy term of HIES alone. The paper's baseline AD (section 5.1) goes the other way: it prunes the heads of
    low entropy first, so it keeps the least focused ones.
    """

    name: ClassVar[str] = "entropy"

    @property
    def _request(self) -> StatsRequest:
        """Attention entropy."""
        return StatsRequest(entropy=True)

    def _scored(self, model: PreTrainedModel, stats: HeadStats) -> torch.Tensor:
        return 1 - stats.entropy()


@dataclass(kw_only=True, eq=False)
class HisSelector(Selector):
    """Keeps the heads and neurons whose mask the loss reacts to most: HIS = E|dL/dm| (Michel et al. 2019).

    Both are in the unit of the loss, to first order what it changes by when a head or a neuron goes, so within one budget
    they are compared as they are.

    Args:
        granularity: What the absolute value is taken over: "sample" (the paper), "token" (its code, up to a scale per
            layer: see `HeadStats.importance`), "batch" (DSP, CAHP).
        per_layer_normalisation: Divide by the L2 norm of the layer's scores, as the code of Michel et al. does.
    """

    name: ClassVar[str] = "his"
    granularity: str = "sample"
    per_layer_normalisation: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.granularity not in GRANULARITIES:
            raise ValueError(f"`granularity` must be one of {', '.join(GRANULARITIES)}, got {self.granularity!r}.")

    @property
    def _request(self) -> StatsRequest:
        """Head importance."""
        return StatsRequest(importance=True)

    def _scored(self, model: PreTrainedModel, stats: HeadStats) -> torch.Tensor:
        scores = telling(stats.importance(self.granularity), "importance")
        if self.per_layer_normalisation:
            norm = scores.nan_to_num().norm(dim=1, keepdim=True)
            scores = scores / torch.where(norm > 0, norm, 1)
        return scores

    def _worth(self, with_neurons: bool) -> tuple[torch.Tensor, Sequence[torch.Tensor] | None]:
        if self.per_layer_normalisation:
            return super()._worth(with_neurons)
        return self.scores, self.neuron_scores if with_neurons else None


@dataclass(kw_only=True, eq=False)
class UsageSelector(Selector):
    """Keeps the experts that the routers of a SHRP model chose most often, counted in training (arXiv 2512.20635).

    The scores are shares of the layer's usage. Ordinary layers keep their heads. `trainer.usage_plan()` counts on a
    slice of the data instead.
    """

    name: ClassVar[str] = "usage"
    budget_kinds: ClassVar[tuple[str, ...]] = ("heads", "fraction", "flops", "latency", "quality")
    takes_neurons: ClassVar[bool] = False
    per_layer: bool = True

    def _heads_with_choice(self, layout: HeadLayout) -> tuple[tuple[int, ...], ...]:
        if not layout.is_routed:
            raise ValueError(
                "`model` has no routed expert layers, so no usage: load it with "
                "`from_pretrained(..., expert_layers=n)` and train it, or take another selector."
            )
        return tuple(heads if i in layout.expert_layers else () for i, heads in enumerate(layout.kept))

    def _scored(self, model: PreTrainedModel, stats: HeadStats | None) -> torch.Tensor:
        layout = self._scored_choice().layout
        shares = torch.full((layout.num_layers, layout.num_heads), torch.nan, dtype=torch.float64)
        for layer in layout.expert_layers:
            usage = layout.layers[layer].router.usage.cpu().double()
            if not usage.sum():
                raise ValueError(
                    f"No usage is recorded for expert layer {layer}: train the model with ShrpTrainer, or count on a "
                    "dataset with `trainer.usage_plan(dataset)`."
                )
            shares[layer] = usage / usage.sum()
        return shares
