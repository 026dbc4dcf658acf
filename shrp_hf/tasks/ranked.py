"""Lists in an order, judged query by query: nDCG, recall, MAP, MRR, by ir-measures."""

from collections.abc import Mapping, Sequence

import numpy as np

from shrp_hf.tasks.kind import NEEDS_METRICS, draws

MEASURES = {"ndcg@10": "nDCG@10", "recall@100": "R@100", "mrr@10": "RR@10", "map": "AP", "mrr": "RR"}
"""Our names -> those of ir-measures."""

Grades = Mapping[int, Mapping[int, int]]
Scores = Mapping[int, Mapping[int, float]]


def per_query(names: Sequence[str], grades: Grades, scores: Scores) -> dict[str, np.ndarray]:
    """Judges every query by itself.

    Args:
        names: Keys of `MEASURES`.
        grades: Query -> document -> how relevant it is, 0 or more; what is not named is not.
        scores: Query -> document -> score of a model, the higher the better.

    Returns:
        Name -> a value from 0 to 1 for each query, in the order of `grades`.

    Raises:
        ImportError: The extra `metrics` is not installed.
    """
    try:
        import ir_measures
    except ImportError as error:
        raise ImportError(NEEDS_METRICS.format("ir-measures")) from error
    measures = {ir_measures.parse_measure(MEASURES[name]): name for name in names}
    qrels = {str(query): {str(doc): int(grade) for doc, grade in found.items()} for query, found in grades.items()}
    run = {str(query): {str(doc): float(score) for doc, score in found.items()} for query, found in scores.items()}
    place = {str(query): row for row, query in enumerate(grades)}
    values = {name: np.zeros(len(grades)) for name in names}
    for found in ir_measures.iter_calc(list(measures), qrels, run):
        values[measures[found.measure]][place[found.query_id]] = found.value
    return values


def resampled_means(values: Sequence[np.ndarray], num_resamples: int, seed: int) -> np.ndarray:
    """Means over queries drawn with replacement, the same ones for all models.

    Args:
        values: A value for each query, one array a model.
        num_resamples: How often they are drawn.
        seed: Seed of the draws.

    Returns:
        Shape (models, num_resamples).
    """
    drawn = draws(len(values[0]), num_resamples, seed)
    return np.array([[model[rows].mean() for rows in drawn] for model in values])
