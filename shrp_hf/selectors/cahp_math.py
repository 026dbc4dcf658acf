"""The geometry of CAHP (arXiv 2606.19150): distances of classes and heads, t-SNE, medoids for every k, their silhouette."""

from itertools import combinations
from typing import Any, Self

import numpy as np
import torch

from shrp_hf.defaults import SEED

MIN_VARIANCE = 1e-6
START_DEVIATION = 1e-4
JITTER = 1e-3


def jeffries_matusita(mean: torch.Tensor, variance: torch.Tensor, a: int, b: int) -> torch.Tensor:
    """Distance of two classes at every position: JM = 2 (1 - exp(-b)), b the Bhattacharyya distance of two normals.

    Args:
        mean: Shape (classes, rows, positions).
        variance: The same shape; at least 1e-6 is taken, as the paper does.
        a: One class.
        b: The other.

    Returns:
        Shape (rows, positions), in [0, 2].
    """
    first, second = variance[a].clamp_min(MIN_VARIANCE), variance[b].clamp_min(MIN_VARIANCE)
    total = first + second
    distance = (mean[a] - mean[b]).square() / (4 * total) + (total / (2 * (first * second).sqrt())).log() / 2
    return -2 * torch.expm1(-distance)


def head_similarity(mean: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
    """Inner products of the heads' feature rows X (JM of all class pairs, side by side), shape (rows, rows).

    X itself grows with the square of the number of classes and is never built: distances and principal components, all
    that t-SNE takes from it, follow from X X^T.
    """
    gram = torch.zeros(mean.shape[1], mean.shape[1], dtype=mean.dtype)
    for a, b in combinations(range(mean.shape[0]), 2):
        features = jeffries_matusita(mean, variance, a, b)
        gram += features @ features.T
    return gram


def head_distances(gram: torch.Tensor) -> np.ndarray:
    """Euclidean distances of the heads' feature rows X, shape (rows, rows), in double precision.

    Args:
        gram: X X^T, shape (rows, rows).

    Raises:
        ValueError: All heads are alike.
    """
    inner = gram.numpy()
    norms = inner.diagonal()
    squared = np.maximum(norms[:, None] + norms[None, :] - 2 * inner, 0)
    np.fill_diagonal(squared, 0)
    if squared.max() <= 1e-12 * max(norms.max(), 1):
        raise ValueError(
            "All heads tell the classes apart alike, so there are no clusters: check that the model is trained "
            "and that the labels belong to its inputs."
        )
    return np.sqrt(squared)


def embed(gram: torch.Tensor, perplexity: float = 10, max_iter: int = 1000, seed: int = SEED) -> np.ndarray:
    """Lays heads out in a plane by t-SNE (scikit-learn's defaults otherwise: PCA start, Barnes-Hut).

    One thread, and distances rounded to float32: t-SNE is chaotic, and neither the number of threads nor the last bits
    of a sum may move a head. The seed does, as in the paper's code, whose PCA at the start is randomised: here the
    exact components are moved by a thousandth of their deviation, about as much as two seeds of that PCA differ.

    Args:
        gram: X X^T, shape (rows, rows).
        perplexity: Neighbours that count.
        max_iter: Steps.
        seed: Of the start.

    Returns:
        Shape (rows, 2).

    Raises:
        ValueError: There are no more heads than the perplexity, or all heads are alike.
        ImportError: scikit-learn is missing.
    """
    try:
        from sklearn.manifold import TSNE
        from threadpoolctl import threadpool_limits
    except ImportError as error:
        raise ImportError("CAHP needs scikit-learn: pip install 'shrp_hf[posthoc]'.") from error
    if len(gram) <= perplexity:
        raise ValueError(
            f"t-SNE with `perplexity={perplexity}` needs more than {perplexity} heads, but there are {len(gram)}"
            " to choose from: lower it, or take another selector (HIES, HIS)."
        )
    with threadpool_limits(1):
        distances = head_distances(gram).astype(np.float32).astype(np.float64)
        jitter = np.random.default_rng(seed).standard_normal((len(gram), 2))
        start = _principal_components(gram.numpy()) + (START_DEVIATION * JITTER * jitter).astype(np.float32)
        tsne = TSNE(perplexity=perplexity, max_iter=max_iter, random_state=seed, metric="precomputed", init=start, n_jobs=1)
        return tsne.fit_transform(distances).astype(np.float64)


def _principal_components(gram: np.ndarray) -> np.ndarray:
    """The first two principal components, scaled as scikit-learn scales the start of t-SNE (deviation 1e-4)."""
    centred = gram - gram.mean(axis=0) - gram.mean(axis=1)[:, None] + gram.mean()
    values, vectors = np.linalg.eigh(centred)
    components = vectors[:, [-1, -2]] * np.sqrt(np.maximum(values[[-1, -2]], 0))
    largest = np.abs(components).argmax(axis=0)
    components *= np.where(components[largest, [0, 1]] < 0, -1, 1)  # an eigenvector's sign is arbitrary
    return (components / components[:, 0].std() * START_DEVIATION).astype(np.float32)


class HeadClusters:
    """Clusters of heads, for every number of clusters; computed once, whatever the degree of the knee.

    Args:
        distances: Of every two heads, shape (rows, rows), float64.
        seed: Of FasterPAM's start and order; None: PAM's greedy start (BUILD) and the heads in their order, which draw
            nothing.
    """

    def __init__(self, distances: np.ndarray, seed: int | None = None) -> None:
        self.seed = seed
        self._distances = distances
        self._found: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._curve: list[tuple[int, float]] = []

    @classmethod
    def in_plane(cls, points: np.ndarray, seed: int = SEED) -> Self:
        """Clusters points, shape (rows, 2), by their distances, as the paper does: FasterPAM from a drawn start."""
        return cls(np.linalg.norm(points[:, None] - points[None], axis=-1), seed)

    def labels(self, num_clusters: int) -> np.ndarray:
        """Returns the cluster of every head among `num_clusters`, shape (rows,)."""
        return self._cluster(num_clusters)[1]

    def medoids(self, num_clusters: int) -> np.ndarray:
        """Returns the row of each cluster's medoid, shape (num_clusters,)."""
        return self._cluster(num_clusters)[0]

    def curve(self) -> list[tuple[int, float]]:
        """Returns (k, mean silhouette) for k = 2 .. rows - 1; once it is 1, the rest is 1."""
        if not self._curve:
            values: list[float] = []
            counts = range(2, len(self._distances))
            for k in counts:
                done = bool(values) and values[-1] >= 1
                values.append(1.0 if done else medoid_silhouette(self._distances, *self._cluster(k)))
            self._curve = list(zip(counts, values, strict=True))
        return self._curve

    def _cluster(self, num_clusters: int) -> tuple[np.ndarray, np.ndarray]:
        if num_clusters not in self._found:
            try:
                from kmedoids import fasterpam
            except ImportError as error:
                raise ImportError("CAHP needs the package kmedoids: pip install 'shrp_hf[posthoc]'.") from error
            start = "build" if self.seed is None else "random"
            found: Any = fasterpam(self._distances, num_clusters, init=start, random_state=self.seed, n_cpu=1)
            self._found[num_clusters] = np.asarray(found.medoids, dtype=int), np.asarray(found.labels, dtype=int)
        return self._found[num_clusters]


def medoid_silhouette(distances: np.ndarray, medoids: np.ndarray, labels: np.ndarray) -> float:
    """MSS: mean of (b - a) / max(a, b) over the heads that are no medoids.

    a is the distance to the own medoid, b the *mean* distance to the other medoids. Heads on one spot (a = b = 0)
    count 0.

    Args:
        distances: Shape (rows, rows).
        medoids: Row of each medoid, shape (k,), k from 2.
        labels: Cluster of each row, an index into `medoids`.
    """
    rows = np.setdiff1d(np.arange(len(distances)), medoids)
    to_medoids = distances[np.ix_(rows, medoids)]
    own = to_medoids[np.arange(len(rows)), labels[rows]]
    others = (to_medoids.sum(axis=1) - own) / (len(medoids) - 1)
    largest = np.maximum(own, others)
    return float(np.mean(np.where(largest > 0, (others - own) / np.where(largest > 0, largest, 1), 0)))
