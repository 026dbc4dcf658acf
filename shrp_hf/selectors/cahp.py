"""CAHP: one head per cluster of heads that tell classes apart in the same way (arXiv 2606.19150)."""

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from transformers import PreTrainedModel

from shrp_hf.defaults import SEED, SIGNATURE_SIZE
from shrp_hf.plans.budget import Budget, find_knee
from shrp_hf.plans.keep_plan import KeepPlan
from shrp_hf.scoring import GRANULARITIES, HeadStats, StatsRequest
from shrp_hf.selectors.base import Selector, min_max, telling
from shrp_hf.selectors.cahp_math import HeadClusters, embed, head_distances, head_similarity


@dataclass(kw_only=True, eq=False)
class HeadClusterSelector(Selector):
    """Clusters heads by how their attention differs between classes, and keeps the most salient head of each cluster.

    A count in the budget is the number of clusters; a layer left without heads gets its most salient ones back on top
    of that (`min_heads_per_layer`, 1 in the paper). Without a count the knee of the silhouette curve decides, which
    hardly depends on the data: see `Budget.knee`. The paper fine-tunes afterwards.

    Args:
        signature_size: Side B of the resized attention maps: 32 for short sentences, 48 for pairs in the paper.
        granularity: Of the salience, measured on the first quarter of the batches: "batch" as in the paper's code,
            "sample" or "token".

    Attributes:
        rows: (layer, head) of every head that there is a choice about.
        curve: (k, mean silhouette) for k = 2 .. rows - 1; serves every degree.
        labels: Cluster of every head in the last plan, shape (rows,).
        medoids: Row of each cluster's medoid in the last plan, shape (clusters,).
    """

    budget_kinds: ClassVar[tuple[str, ...]] = ("knee", "heads", "fraction")
    takes_neurons: ClassVar[bool] = False
    signature_size: int = SIGNATURE_SIZE
    granularity: str = "batch"
    rows: list[tuple[int, int]] = field(init=False, default_factory=list, repr=False)
    labels: np.ndarray | None = field(init=False, default=None, repr=False)
    _clusters: HeadClusters | None = field(init=False, default=None, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.per_layer:
            raise ValueError("`per_layer=True` does not suit CAHP: its clusters reach over layers. Take another selector.")
        if self.granularity not in GRANULARITIES:
            raise ValueError(f"`granularity` must be one of {', '.join(GRANULARITIES)}, got {self.granularity!r}.")

    @property
    def _request(self) -> StatsRequest:
        """Signatures, and importance on the first quarter of the batches."""
        return StatsRequest(salience=True, signature_size=self.signature_size)

    @property
    def curve(self) -> list[tuple[int, float]]:
        """(k, mean silhouette) for k = 2 .. rows - 1."""
        return self._scored_clusters().curve()

    @property
    def medoids(self) -> np.ndarray:
        """Row of each cluster's medoid in the last plan, shape (clusters,)."""
        if self.labels is None:
            raise ValueError("There is no plan yet: call `select` or `plan` first.")
        return self._scored_clusters().medoids(int(self.labels.max()) + 1)

    def keep(self, count: int) -> KeepPlan:
        """Returns the plan of `count` clusters: the most salient head of each, and what `min_heads_per_layer` adds.

        Raises:
            ValueError: There are fewer heads.
        """
        choice, clusters = self._scored_choice(), self._scored_clusters()
        if not 1 <= count <= choice.available:
            raise ValueError(f"`budget` asks for {count} clusters, but there are {choice.available} heads to choose from.")
        self.labels = clusters.labels(count)
        order = sorted(range(len(self.rows)), key=lambda row: (-self._salience(row), row))
        best: dict[int, tuple[int, int]] = {}
        for row in order:
            best.setdefault(int(self.labels[row]), self.rows[row])
        chosen = set(best.values())
        for layer, heads in enumerate(choice.open):
            missing = min(self.min_heads_per_layer, len(heads)) - sum(kept == layer for kept, _ in chosen)
            spare = [self.rows[row] for row in order if self.rows[row][0] == layer and self.rows[row] not in chosen]
            chosen.update(spare[: max(missing, 0)])
        return choice.plan(chosen)

    @abstractmethod
    def _clustered(self, gram: torch.Tensor) -> HeadClusters:
        """Returns the clusters of heads whose feature rows X have the inner products `gram`, shape (rows, rows)."""

    def _scored(self, model: PreTrainedModel, stats: HeadStats) -> torch.Tensor:
        self.rows = self._scored_choice().rows
        position = {row: i for i, row in enumerate(stats.rows)}
        index = [position[row] for row in self.rows]
        mean, variance = (moment[:, index] for moment in stats.class_moments())
        salience = telling(stats.importance(self.granularity, first_quarter=True), "salience")
        self._clusters, self.labels = self._clustered(head_similarity(mean, variance)), None
        return min_max(salience)

    def _count(self, budget: Budget) -> int:
        if budget.kind != "knee":
            return super()._count(budget)
        return round(find_knee(self.curve, budget.degree))

    def _fewest(self) -> int:
        return 2  # clusters; `min_heads_per_layer` is on top of them

    def _salience(self, row: int) -> float:
        return float(self.scores[self.rows[row]])

    def _scored_clusters(self) -> HeadClusters:
        if self._clusters is None:
            raise ValueError("Nothing is scored yet: call `select` or `score` with a model first.")
        return self._clusters


@dataclass(kw_only=True, eq=False)
class CahpSelector(HeadClusterSelector):
    """CAHP as published: heads are clustered in a plane that t-SNE lays them out in, from a drawn start.

    Another seed or other samples are another plane, and another plan: see `CahpDirectSelector`, which needs no plane.

    Args:
        signature_size: Side B of the resized attention maps: 32 for short sentences, 48 for pairs in the paper.
        granularity: Of the salience, measured on the first quarter of the batches: "batch" as in the paper's code,
            "sample" or "token".
        perplexity: Of t-SNE; there must be more heads than that.
        max_iter: Steps of t-SNE.
        seed: Of t-SNE and FasterPAM.

    Attributes:
        points: The t-SNE plane, shape (rows, 2).
    """

    name: ClassVar[str] = "cahp"
    perplexity: float = 10
    max_iter: int = 1000
    seed: int = SEED
    _plane: np.ndarray | None = field(init=False, default=None, repr=False)

    @property
    def points(self) -> np.ndarray:
        """The t-SNE plane, shape (rows, 2)."""
        self._scored_clusters()
        return self._plane

    def _clustered(self, gram: torch.Tensor) -> HeadClusters:
        self._plane = embed(gram, self.perplexity, self.max_iter, self.seed)
        return HeadClusters.in_plane(self._plane, self.seed)


@dataclass(kw_only=True, eq=False)
class CahpDirectSelector(HeadClusterSelector):
    """CAHP without its plane, ours: k-medoids, silhouette and knee on the distances of the feature rows X themselves.

    Nothing is drawn: the medoids start greedily (BUILD of PAM), so equal statistics are an equal plan. Everything else,
    from the signatures to the salience, is `CahpSelector`'s.

    Args:
        signature_size: Side B of the resized attention maps: 32 for short sentences, 48 for pairs in the paper.
        granularity: Of the salience, measured on the first quarter of the batches: "batch" as in the paper's code,
            "sample" or "token".
    """

    name: ClassVar[str] = "cahp-direct"

    def _clustered(self, gram: torch.Tensor) -> HeadClusters:
        return HeadClusters(head_distances(gram))
