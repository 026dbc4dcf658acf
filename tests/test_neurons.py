"""Neurons: importance and means against a reference that takes one sample at a time, and who chooses by them."""

import copy
import re

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from shrp_hf import (
    Budget,
    HisSelector,
    KeepPlan,
    NeuronImportanceSelector,
    NeuronMagnitudeSelector,
    NeuronRandomSelector,
    masked_heads,
    prune_heads,
)
from shrp_hf.families import head_layout
from shrp_hf.measuring import count_flops, model_cost, peak_memory
from shrp_hf.models.slicing import OutputMeans
from shrp_hf.scoring import HeadStats, StatsRequest, collect_head_stats, neuron_magnitude
from shrp_hf.selectors import NEURON_SELECTORS
from tests.test_families import ALL, EXACT, TABLE, inputs, outputs, stock
from tests.tiny import tiny_routed

EMPTY = KeepPlan.full(3, 4).with_neurons(((), (), ()), 64)
BOTH = StatsRequest(importance=True, neurons=True, means=True)
LABELS = {"SequenceClassification": torch.tensor([0, 2, 1, 0, 1]), "ImageClassification": torch.tensor([0, 2, 1])}


def batches(family, padding="right"):
    head = "ImageClassification" if family == "vit" else "SequenceClassification"
    first = inputs(family, padding) | {"labels": LABELS[head]}
    return [first, {name: value[:2].flip(0) for name, value in first.items()}]


def reference(model, found):
    """Importance and means, by masks on all neurons, one sample after the other."""
    layout = head_layout(model)
    importance = [torch.zeros(n, dtype=torch.float64) for n in layout.num_neurons]
    means = [[torch.zeros_like(n) for n in importance], [torch.zeros(len(k) * 8, dtype=torch.float64) for k in layout.kept]]
    samples = [{k: value[i : i + 1] for k, value in batch.items()} for batch in found for i in range(len(batch["labels"]))]
    tokens = 0
    for sample in samples:
        masks, seen, handles = [], {}, []
        real = sample.get("attention_mask", torch.ones(1, 1)).bool()
        for layer in range(layout.num_layers):
            masks.append(torch.ones(layout.num_neurons[layer], dtype=torch.float64, requires_grad=True))
            for kind, module in enumerate((layout.neurons_out(layer), layout.output(layer))):

                def keep(_, given, layer=layer, kind=kind, masks=masks, seen=seen):
                    seen[kind, layer] = given[0].detach()
                    return (given[0] * masks[layer],) if kind == 0 else None

                if hasattr(module, "weight"):
                    handles.append(module.register_forward_pre_hook(keep))
        gradients = torch.autograd.grad(model(**sample).loss, masks, allow_unused=True)
        for handle in handles:
            handle.remove()
        length = next(iter(seen.values())).shape[1]
        real = real.expand(1, length)
        tokens += int(real.sum())
        for layer, gradient in enumerate(gradients):
            if gradient is not None:
                importance[layer] += gradient.abs() / len(samples)
        for (kind, layer), values in seen.items():
            means[kind][layer] += values[real].sum(dim=0)
    return importance, [[total / tokens for total in kind] for kind in means]


@pytest.mark.parametrize("family", ["bert", "electra", "distilbert", "vit"])
@pytest.mark.parametrize("padding", ["left", "right"])
def test_importance_and_means_equal_the_reference(family, padding):
    model, found = stock(family), batches(family, padding)
    importance, means = reference(model, found)
    stats = collect_head_stats(model, found, BOTH)
    alone = collect_head_stats(model, found, StatsRequest(neurons=True))
    heads = collect_head_stats(model, found, StatsRequest(importance=True))
    torch.testing.assert_close(stats.importance(), heads.importance(), rtol=1e-9, atol=0)
    for i in range(3):
        torch.testing.assert_close(stats.neuron_importance()[i], importance[i], **EXACT)
        torch.testing.assert_close(alone.neuron_importance()[i], importance[i], **EXACT)
        torch.testing.assert_close(stats.output_means().neurons[i], means[0][i], **EXACT)
        torch.testing.assert_close(stats.output_means().heads[i].flatten(), means[1][i], **EXACT)


@pytest.mark.parametrize("family", ["bert", "vit"])
def test_layers_without_heads_or_neurons_are_scored_around(family):
    plan = KeepPlan(((), (1, 2), ALL), 4, (tuple(range(10)), (), tuple(range(64))), 64)
    model, found = prune_heads(stock(family), plan), batches(family)
    importance, means = reference(model, found)
    stats = collect_head_stats(model, found, BOTH)
    for i in range(3):
        torch.testing.assert_close(stats.neuron_importance()[i], importance[i], **EXACT)
    assert stats.output_means().heads[0] is None
    assert stats.output_means().neurons[1] is None
    torch.testing.assert_close(stats.output_means().heads[1].flatten(), means[1][1], **EXACT)
    torch.testing.assert_close(stats.output_means().neurons[0], means[0][0], **EXACT)
    cut = KeepPlan(((), (2,), (0, 3)), 4, ((1, 2), (), (5,)), (10, 0, 64))
    with masked_heads(model, cut, stats.output_means()):
        masked = outputs(model, family)
    torch.testing.assert_close(outputs(prune_heads(model, cut, stats.output_means()), family), masked, **EXACT)


def test_an_activation_that_cannot_be_computed_again_is_held():
    model, found = stock("bert"), batches("bert")
    expected = collect_head_stats(model, found, BOTH).neuron_importance()
    for layer in model.bert.encoder.layer:  # what reaches the second matrix is no longer what the activation gave
        layer.intermediate.register_forward_hook(lambda _, __, out: out * 0.5)
        layer.output.dense.weight.data *= 2
    for ours, theirs in zip(collect_head_stats(model, found, BOTH).neuron_importance(), expected, strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)


def test_activations_of_one_layer_are_in_memory_at_a_time():
    fields = {"hidden_size": 16, "num_hidden_layers": 8, "num_attention_heads": 2, "intermediate_size": 512, "vocab_size": 99}
    model = BertForSequenceClassification(BertConfig(**fields)).eval()
    batch = {"input_ids": torch.randint(1, 99, (4, 32)), "labels": torch.tensor([0, 1, 1, 0])}
    used = {}
    for request in (StatsRequest(importance=True), BOTH):
        used[request.neurons] = peak_memory(lambda request=request: collect_head_stats(model, [batch], request))
    activation = 4 * 32 * 512 * 4  # bytes of one layer's
    assert used[True] - used[False] < 3 * activation


def test_what_is_cut_leaves_its_mean():
    """With everything constant over tokens the mean is all there is, so nothing changes."""
    model = stock("bert")
    for layer in model.bert.encoder.layer:
        layer.intermediate.dense.weight.data.zero_()
    stats = collect_head_stats(model, batches("bert"), StatsRequest(means=True))
    plan = KeepPlan.full(3, 4).with_neurons(((), (1, 2), tuple(range(5))), 64)
    before = outputs(model, "bert")
    assert not torch.allclose(outputs(prune_heads(model, plan), "bert"), before, atol=1e-3)
    torch.testing.assert_close(outputs(prune_heads(model, plan, stats.output_means()), "bert"), before, **EXACT)


def test_statistics_are_saved_resumed_and_loaded(tmp_path):
    model, found = stock("distilbert"), batches("distilbert")
    expected = collect_head_stats(model, found, BOTH)

    def broken():
        yield found[0]
        raise InterruptedError

    with pytest.raises(InterruptedError):
        collect_head_stats(model, broken(), BOTH, cache=tmp_path / "stats", save_every=1)
    resumed = collect_head_stats(model, found, BOTH, cache=tmp_path / "stats")
    for stats in (resumed, HeadStats.load(tmp_path / "stats")):
        assert stats.request == BOTH
        assert (stats.widths, stats.head_size) == ((64, 64, 64), 8)
        assert all(torch.equal(stats.sums[name], value) for name, value in expected.sums.items())


# --- who chooses ---


def scored(selector, model, scores):
    """A selector that has scored this model so."""
    selector._layout, selector.scores = head_layout(model), tuple(torch.tensor(row, dtype=torch.float64) for row in scores)
    return selector


RISING = [[i + 100.0 * layer for i in range(64)] for layer in range(3)]


@pytest.mark.parametrize(
    ("options", "widths"),
    [
        ({"keep": 0.5}, (32, 32, 32)),
        ({"keep": 0.5, "per_layer": False}, (0, 32, 64)),
        ({"keep": 0.3}, (19, 19, 19)),
        ({"keep": 0.3, "multiple_of": 8}, (16, 16, 16)),
        ({"keep": 0.95, "multiple_of": 48}, (48, 48, 48)),
        ({"keep": 0.5, "frozen_layers": [1]}, (32, 64, 32)),
        ({"keep": 0.25, "per_layer": False, "frozen_layers": [2]}, (0, 32, 64)),
        ({"keep": 0}, (0, 0, 0)),
        ({"keep": 1}, (64, 64, 64)),
    ],
    ids=str,
)
def test_the_best_neurons_stay(options, widths):
    model = stock("bert")
    plan = scored(NeuronMagnitudeSelector(**options), model, RISING).plan(KeepPlan(((0,), (), ALL), 4))
    assert plan.kept == ((0,), (), ALL)
    assert plan.num_neurons == (64, 64, 64)
    assert plan.neurons == tuple(tuple(range(64 - width, 64)) for width in widths)
    cut = prune_heads(model, plan)
    assert head_layout(cut).num_neurons == widths


def test_selectors_score_and_complete_a_plan_for_heads():
    model, found = stock("bert"), batches("bert")
    heads = HisSelector(budget=Budget.fraction(0.5))
    neurons = NeuronImportanceSelector(keep=0.25)
    stats = collect_head_stats(model, found, heads.request | neurons.request)
    plan = neurons.select(model, stats=stats, plan=heads.select(model, stats=stats))
    assert (plan.num_kept, plan.num_kept_neurons) == (6, 48)
    assert neurons.select(model, found).neurons == plan.neurons
    best = stats.neuron_importance()[1].topk(16).indices
    assert set(best.tolist()) == set(plan.neurons[1])
    assert NeuronMagnitudeSelector(keep=1).score(model)[0].equal(neuron_magnitude(model)[0])
    draws = {seed: NeuronRandomSelector(keep=0.5, seed=seed).select(model) for seed in (0, 1)}
    assert draws[0] != draws[1]
    assert draws[0] == NeuronRandomSelector(keep=0.5).select(model)
    assert set(NEURON_SELECTORS) == {"importance", "magnitude", "random"}


def test_expert_layers_have_no_neurons_to_choose():
    model = tiny_routed([1])
    model.prune_heads(KeepPlan((ALL, (2,), ALL), 4))
    plan = NeuronImportanceSelector(keep=0.5).select(model, batches("bert"))
    assert [len(kept) for kept in plan.neurons] == [32, 0, 32]
    assert prune_heads(model, plan).config.intermediate_sizes == [32, 0, 32]


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: NeuronMagnitudeSelector(keep=1.5), "`keep` must be a share from 0 to 1, got 1.5."),
        (
            lambda: NeuronMagnitudeSelector(keep=0.5, multiple_of=0),
            "`multiple_of` must be a whole number from 1, got 0.",
        ),
        (
            lambda: NeuronMagnitudeSelector(keep=0.5, frozen_layers=[3]).select(stock("bert")),
            "`frozen_layers` names layer 3, but the model's layers are 0 to 2.",
        ),
        (
            lambda: NeuronMagnitudeSelector(keep=0.5, frozen_layers=[0, 1, 2]).select(stock("bert")),
            "`frozen_layers` [0, 1, 2] leave no neuron to choose.",
        ),
        (
            lambda: NeuronImportanceSelector(keep=0.5).select(stock("bert")),
            "`NeuronImportanceSelector` needs calibration data: give `batches` or `stats`.",
        ),
        (
            lambda: NeuronMagnitudeSelector(keep=0.5).plan(),
            "Nothing is scored yet: call `select` or `score` with a model first.",
        ),
        (
            lambda: NeuronMagnitudeSelector(keep=0.5).select(stock("bert"), plan=KeepPlan.full(2, 4)),
            "`plan` is for 2 layers of 4 heads, but the model that was scored has 3 layers of 4 heads.",
        ),
        (
            lambda: collect_head_stats(prune_heads(stock("bert"), EMPTY), batches("bert"), BOTH),
            "`model` has no FFN neurons left: leave `neurons` out of the request.",
        ),
    ],
)
def test_what_cannot_be_chosen_is_refused(act, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        act()


# --- what it costs ---


@pytest.mark.parametrize("family", ["bert", "distilbert", "vit"])
def test_cost_of_a_plan_is_that_of_the_cut_model(family):
    model = stock(family, dtype=torch.float32)
    cost = model_cost(model, 2, 7)
    for plan in (KeepPlan(((0, 2), (), ALL), 4, ((1, 2, 3), range(64), ()), 64), KeepPlan(((1,), ALL, (2,)), 4)):
        cut = prune_heads(model, plan)
        heads, neurons = [len(kept) for kept in plan.kept], plan.neurons and [len(kept) for kept in plan.neurons]
        assert cost.after(heads, neurons) == (cut.num_parameters(), count_flops(cut, 2, 7))
        again = model_cost(cut, 2, 7)
        assert again.after([min(1, n) for n in heads], again.neurons) == cost.after([min(1, n) for n in heads], neurons)


def test_cost_of_experts_is_that_of_the_cut_model():
    model = tiny_routed([2])
    with pytest.raises(ValueError, match=r"^Layers \[2\] are routed: which experts run is not fixed. Prune them first.$"):
        model_cost(model, 2, 7)
    model.prune_heads(KeepPlan((ALL, ALL, (0, 1, 3)), 4))
    cut = prune_heads(model, KeepPlan(((1,), ALL, (3,)), 4))
    assert model_cost(model, 2, 7).after([1, 4, 1]) == (cut.num_parameters(), count_flops(cut, 2, 7))


def test_magnitude_is_the_norm_of_rows_and_column():
    for family in TABLE:
        model = stock(family)
        layout = head_layout(model)
        weights, out = [weight for weight, _ in layout.neurons_in(1)], layout.neurons_out(1).weight
        expected = torch.stack([torch.cat([*(weight[i] for weight in weights), out[:, i]]).norm() for i in range(64)])
        torch.testing.assert_close(neuron_magnitude(model)[1], expected.detach(), **EXACT)


def test_means_of_another_model_are_refused():
    model = stock("bert")
    means = collect_head_stats(model, batches("bert"), StatsRequest(means=True)).output_means()
    cut = prune_heads(model, {1: [0]})
    before = copy.deepcopy(cut)
    message = (
        r"^`output_means` has those of shape \(4, 8\) for the heads of layer 1, which need \(3, 8\): take the means of this "
        r"very model \(`StatsRequest\(means=True\)`\).$"
    )
    for act in (prune_heads, lambda *a: masked_heads(*a).__enter__(), type(cut).prune_heads):
        with pytest.raises(ValueError, match=message):
            act(cut, {0: [1]}, means)
    with pytest.raises(ValueError, match="has none for the neurons of layer 0, which need"):
        prune_heads(model, {0: [1]}, OutputMeans(means.heads, ()))
    assert torch.equal(outputs(cut, "bert"), outputs(before, "bert"))
