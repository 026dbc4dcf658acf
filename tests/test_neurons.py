"""Neurons: importance and means against a reference that takes one sample at a time."""

import copy
import re

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from shrp_hf import (
    KeepPlan,
    masked_heads,
    prune_heads,
)
from shrp_hf.families import head_layout
from shrp_hf.measuring import peak_memory
from shrp_hf.models.slicing import OutputMeans
from shrp_hf.scoring import HeadStats, StatsRequest, collect_head_stats, neuron_magnitude
from tests.test_families import ALL, EXACT, TABLE, inputs, outputs, stock

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


@pytest.mark.parametrize("family", sorted(set(TABLE) - {"roberta", "xlm-roberta", "camembert"}))  # BERT's map and layers
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


def test_scoring_neurons_of_a_model_without_any_is_refused():
    message = "`model` has no FFN neurons left: leave `neurons` out of the request."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        collect_head_stats(prune_heads(stock("bert"), EMPTY), batches("bert"), BOTH)


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
