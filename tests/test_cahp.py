"""CAHP's steps equal short references, its knee is what the literature's procedure gives, and its refusals are clear."""

import itertools
import math
import re

import kmedoids
import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from shrp_hf.plans.budget import Budget, KneeNotFoundError, find_knee
from shrp_hf.scoring import StatsRequest, collect_head_stats
from shrp_hf.selectors import CahpDirectSelector, CahpSelector
from shrp_hf.selectors.cahp_math import (
    HeadClusters,
    embed,
    head_distances,
    head_similarity,
    jeffries_matusita,
    medoid_silhouette,
)

CONFIG = {
    "hidden_size": 16,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "intermediate_size": 8,
    "vocab_size": 40,
    "num_labels": 3,
    "initializer_range": 0.3,
}
OPTIONS = {"signature_size": 8, "max_iter": 300}


def exact(message):
    return f"^{re.escape(message)}$"


def bert(**options):
    return BertForSequenceClassification(BertConfig(**CONFIG | options))


def text_batches(num_batches=4):
    batches = []
    for _ in range(num_batches):
        mask = (torch.arange(7) < torch.randint(2, 8, (6, 1))).long()
        tokens = torch.randint(2, 40, (6, 7))
        batches.append({"input_ids": tokens, "attention_mask": mask, "labels": torch.arange(6) % 3})
    return batches


def moments(classes=3, rows=12, positions=20):
    return torch.rand(2, classes, rows, positions, dtype=torch.float64)


def test_distance_follows_its_formula_and_its_variance_floor():
    mean = torch.tensor([[[0.3]], [[0.5]], [[0.3]]], dtype=torch.float64)
    variance = torch.tensor([[[0.02]], [[0.0]], [[0.02]]], dtype=torch.float64)
    total = 0.02 + 1e-6
    distance = 0.2**2 / (4 * total) + 0.5 * math.log(total / (2 * math.sqrt(0.02 * 1e-6)))
    assert jeffries_matusita(mean, variance, 0, 1).item() == pytest.approx(2 * (1 - math.exp(-distance)))
    assert jeffries_matusita(mean, variance, 0, 2).item() == 0


def test_similarity_equals_that_of_the_features_of_all_class_pairs():
    mean, variance = moments()
    features = torch.cat([jeffries_matusita(mean, variance, a, b) for a in range(3) for b in range(a + 1, 3)], dim=1)
    assert features.shape == (12, 60)
    torch.testing.assert_close(head_similarity(mean, variance), features @ features.T)


def test_like_heads_lie_together_in_the_plane():
    features = torch.cat([torch.zeros(8, 5), torch.full((8, 5), 3.0)]).double() + 0.1 * torch.randn(16, 5).double()
    plane = embed(features @ features.T, perplexity=5)
    assert plane.shape == (16, 2)
    labels = HeadClusters.in_plane(plane).labels(2)
    assert len(set(labels[:8])) == len(set(labels[8:])) == 1
    assert labels[0] != labels[8]


def test_the_plane_is_reproducible_to_the_bit_whatever_the_last_bits_of_a_sum():
    features = torch.rand(16, 30, dtype=torch.float64)
    gram = features @ features.T
    assert np.array_equal(embed(gram), embed(gram * (1 + 1e-15)))
    assert not np.array_equal(embed(gram, seed=0), embed(gram * 2, seed=0))


def test_silhouette_equals_a_loop():
    points = np.random.rand(15, 2)
    clusters = HeadClusters.in_plane(points, seed=3)
    curve = dict(clusters.curve())
    assert list(curve) == list(range(2, 15))
    distances = np.sqrt(((points[:, None] - points[None]) ** 2).sum(-1))
    for k in (2, 5, 14):
        found = kmedoids.fasterpam(distances, k, random_state=3)
        values = []
        for i in set(range(15)) - set(found.medoids):
            own = found.medoids[found.labels[i]]
            a = distances[i, own]
            b = np.mean([distances[i, m] for m in found.medoids if m != own])
            values.append((b - a) / max(a, b))
        assert curve[k] == pytest.approx(np.mean(values))


def test_once_the_silhouette_is_one_the_rest_is_one():
    points = np.repeat(np.random.rand(4, 2), 3, axis=0)  # four spots of three heads
    curve = dict(HeadClusters.in_plane(points).curve())
    assert all(value < 1 for k, value in curve.items() if k < 4)
    assert all(value == 1 for k, value in curve.items() if k >= 4)


def test_heads_on_one_spot_count_zero():
    assert medoid_silhouette(np.zeros((4, 4)), np.array([0, 1]), np.array([0, 1, 0, 1])) == 0


def test_the_degree_sets_the_head_count_whatever_the_data():
    shares = []
    for seed in range(3):
        points = np.random.default_rng(seed).uniform(size=(144, 2))
        curve = HeadClusters.in_plane(points, seed).curve()
        shares.append([100 * find_knee(curve, degree) / 144 for degree in range(2, 7)])
    np.testing.assert_allclose(np.mean(shares, axis=0), [48, 30, 24, 19, 17], atol=1.5)


def test_one_curve_serves_every_degree(monkeypatch):
    model, batches = bert(), text_batches()
    calls = []
    original = kmedoids.fasterpam
    monkeypatch.setattr(kmedoids, "fasterpam", lambda *args, **kw: calls.append(args[1]) or original(*args, **kw))
    selector = CahpSelector(budget=Budget.knee(2), **OPTIONS)
    selector.select(model, batches)
    assert sorted(calls) == list(range(2, 16))
    counts = [len(set(selector.labels))]
    for degree in (3, 4):
        selector.plan(Budget.knee(degree))
        counts.append(len(set(selector.labels)))
    assert len(calls) == 14
    assert counts == [round(find_knee(selector.curve, degree)) for degree in (2, 3, 4)]
    assert selector.points.shape == (16, 2)


def test_the_most_salient_head_of_each_cluster_stays_and_empty_layers_get_one_back():
    model, batches = bert(), text_batches()
    selector = CahpSelector(budget=Budget.heads(3), **OPTIONS)
    plan = selector.select(model, batches)
    stats = collect_head_stats(model, batches, StatsRequest(salience=True))
    salience = stats.importance("batch", first_quarter=True)
    expected = {}
    for (layer, head), label in zip(selector.rows, selector.labels, strict=True):
        if label not in expected or salience[layer, head] > salience[expected[label]]:
            expected[label] = (layer, head)
    chosen = set(expected.values())
    assert len(chosen) == 3
    for layer in range(4):
        if not any(i == layer for i, _ in chosen):
            chosen.add((layer, int(salience[layer].argmax())))
    assert {(layer, head) for layer, heads in enumerate(plan.kept) for head in heads} == chosen
    assert (selector.scores.min(), selector.scores.max()) == (0, 1)
    unguarded = CahpSelector(budget=Budget.heads(3), min_heads_per_layer=0, **OPTIONS).select(model, batches)
    assert {(i, head) for i, heads in enumerate(unguarded.kept) for head in heads} == set(expected.values())


@pytest.mark.parametrize("count", [1, 16])
@pytest.mark.parametrize(("kind", "options"), [(CahpSelector, OPTIONS), (CahpDirectSelector, {"signature_size": 8})])
def test_the_extreme_counts_work(kind, options, count):
    selector = kind(budget=Budget.heads(count), min_heads_per_layer=0, **options)
    assert selector.select(bert(), text_batches()).num_kept == count


def test_frozen_layers_are_not_clustered():
    selector = CahpSelector(budget=Budget.heads(5), frozen_layers=[1], **OPTIONS)
    plan = selector.select(bert(), text_batches())
    assert plan.kept[1] == (0, 1, 2, 3)
    assert len(selector.rows) == 12
    assert len(set(selector.labels)) == 5


def test_salience_comes_from_the_first_quarter():
    model, batches = bert(), text_batches(8)
    model.set_attn_implementation("eager")  # as the signatures need it: the same kernels, the same bits
    request = StatsRequest(importance=True)
    first = collect_head_stats(model, batches[:2], request).importance("batch")
    selector = CahpSelector(budget=Budget.heads(5), **OPTIONS)
    selector.select(model, batches)
    torch.testing.assert_close(selector.scores, (first - first.min()) / (first.max() - first.min()))


def test_no_knee_is_an_error_with_the_curve(monkeypatch):
    monkeypatch.setattr("shrp_hf.selectors.cahp_math.medoid_silhouette", lambda *args: 0.5)
    selector = CahpSelector(budget=Budget.knee(4), **OPTIONS)
    points = ", ".join(f"({k}, 0.5)" for k in range(2, 16))
    message = (
        "The curve of 14 points has no knee at `degree=4`: try another degree, or give a count (`Budget.heads`). The "
        f"curve: {points}."
    )
    with pytest.raises(KneeNotFoundError, match=exact(message)):
        selector.select(bert(), text_batches())
    assert selector.plan(Budget.heads(5)).num_kept >= 5  # the pass is not lost


def test_fewer_heads_than_the_perplexity_needs():
    message = (
        "t-SNE with `perplexity=10` needs more than 10 heads, but there are 8 to choose from: lower it, or take another "
        "selector (HIES, HIS)."
    )
    with pytest.raises(ValueError, match=exact(message)):
        CahpSelector(budget=Budget.heads(3), **OPTIONS).select(bert(num_hidden_layers=2), text_batches())
    small = CahpSelector(budget=Budget.heads(3), perplexity=4, **OPTIONS)
    assert small.select(bert(num_hidden_layers=2), text_batches()).num_kept >= 3


def test_heads_that_are_all_alike_are_refused():
    message = (
        "All heads tell the classes apart alike, so there are no clusters: check that the model is trained and that the "
        "labels belong to its inputs."
    )
    with pytest.raises(ValueError, match=exact(message)):
        embed(torch.ones(16, 16, dtype=torch.float64))


def test_too_many_clusters_are_refused():
    message = "`budget` asks for 17 clusters, but there are 16 heads to choose from."
    selector = CahpSelector(budget=Budget.heads(16), **OPTIONS)
    selector.select(bert(), text_batches())
    with pytest.raises(ValueError, match=exact(message)):
        selector.keep(17)


def test_the_seed_reaches_the_plane():
    features = torch.rand(16, 30, dtype=torch.float64)
    gram = features @ features.T
    planes = [embed(gram, seed=seed) for seed in (0, 0, 1)]
    assert np.array_equal(planes[0], planes[1])
    assert not np.allclose(planes[0], planes[2])


def test_salience_of_zero_is_refused():
    model = bert()
    torch.nn.init.zeros_(model.classifier.weight)
    with pytest.raises(ValueError, match="^The salience of every head is 0, which chooses nothing: check that "):
        CahpSelector(budget=Budget.heads(8), perplexity=5, **OPTIONS).select(model, text_batches())


# --- without the plane ---


def grouped(groups=5, size=4, positions=300):
    """Feature rows in groups that lie far apart, as those of heads that do the same."""
    generator = torch.Generator().manual_seed(0)
    centres, noise = (
        torch.randn(*shape, generator=generator).double() for shape in ((groups, 1, positions), (groups, size, positions))
    )
    return (centres + 0.3 * noise).flatten(0, 1)


def partition(labels):
    return {tuple(np.flatnonzero(labels == label)) for label in set(labels)}


def test_distances_are_those_of_the_features():
    mean, variance = moments()
    features = torch.cat([jeffries_matusita(mean, variance, a, b) for a, b in itertools.combinations(range(3), 2)], dim=1)
    expected = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist")
    distances = head_distances(head_similarity(mean, variance))
    assert distances.dtype == np.float64
    np.testing.assert_allclose(distances, expected, rtol=0, atol=1e-10)


def test_medoids_of_groups_are_the_best_of_all_subsets():
    features = grouped(groups=3)
    distances = head_distances(features @ features.T)
    clusters = HeadClusters(distances)
    for k in (1, 3):
        costs = {rows: distances[:, rows].min(axis=1).sum() for rows in itertools.combinations(range(12), k)}
        assert set(clusters.medoids(k)) == set(min(costs, key=costs.get))
    assert partition(clusters.labels(3)) == {(0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10, 11)}


def test_without_the_plane_neither_a_seed_nor_noise_moves_a_head():
    features = grouped()
    gram = features @ features.T
    noise = torch.randn(gram.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    jittered = gram * (1 + 1e-6 * (noise + noise.T))
    found, moved = HeadClusters(head_distances(gram)), HeadClusters(head_distances(jittered))
    for k in (2, 5, 9):
        assert np.array_equal(found.labels(k), moved.labels(k))
    for seed in range(5):  # a drawn start ends in the same groups
        assert partition(HeadClusters(head_distances(gram), seed).labels(5)) == partition(found.labels(5))
    assert not np.allclose(embed(gram, perplexity=5, max_iter=300), embed(jittered, perplexity=5, max_iter=300))


def test_direct_clusters_silhouette_and_knee_are_of_the_features_themselves():
    model, batches = bert(), text_batches()
    selector = CahpDirectSelector(budget=Budget.knee(2), signature_size=8)
    plan = selector.select(model, batches)
    assert len(set(selector.labels)) == round(find_knee(selector.curve, 2))
    stats = collect_head_stats(model, batches, selector.request)
    mean, variance = stats.class_moments()
    features = torch.cat([jeffries_matusita(mean, variance, a, b) for a, b in itertools.combinations(range(3), 2)], dim=1)
    distances = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist").numpy()
    curve = dict(selector.curve)
    for k in (2, 6, 15):
        selector.plan(Budget.heads(k))
        labels, medoids = selector.labels, list(selector.medoids)
        assert curve[k] == pytest.approx(medoid_silhouette(distances, np.array(medoids), labels), abs=1e-10)
        cost = distances[:, medoids].min(axis=1).sum()
        assert distances[np.arange(16), np.array(medoids)[labels]].sum() == pytest.approx(cost, abs=1e-10)
        for i, other in itertools.product(range(k), set(range(16)) - set(medoids)):  # no exchange of a medoid is better
            swapped = [*medoids[:i], other, *medoids[i + 1 :]]
            assert distances[:, swapped].min(axis=1).sum() > cost - 1e-10
    assert selector.plan() == plan
    torch.rand(3)  # whatever the generators hold
    np.random.rand(3)
    assert CahpDirectSelector(budget=Budget.knee(2), signature_size=8).select(model, batches) == plan


def test_without_the_plane_few_heads_suffice():
    selector = CahpDirectSelector(budget=Budget.heads(3), signature_size=8)
    assert selector.select(bert(num_hidden_layers=1), text_batches()).num_kept == 3
