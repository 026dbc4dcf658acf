"""Heads and neurons within one budget: the best of all plans, counted on models that were cut, or refused before scoring."""

import itertools
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from shrp_hf.families import head_layout
from shrp_hf.measuring import CostTable, count_flops, flop_table, parameter_table
from shrp_hf.measuring import latency as measured
from shrp_hf.measuring.environment import environment
from shrp_hf.plans.budget import Budget, Serving
from shrp_hf.plans.keep_plan import KeepPlan
from shrp_hf.pruning import masked_heads, prune_heads
from shrp_hf.scoring import StatsRequest, collect_head_stats, neuron_magnitude, weight_magnitude
from shrp_hf.selectors import (
    CahpSelector,
    EntropySelector,
    HiesSelector,
    HisSelector,
    MagnitudeSelector,
    RandomSelector,
    UsageSelector,
)
from shrp_hf.selectors.spending import Spending
from tests.tiny import batch, tiny_bert, tiny_routed

SECONDS = CostTable("seconds", 5.0, 1.0, (0, 1, 4), (0.0, 4.0, 7.0), (0, 16, 64), (0.0, 3.0, 12.0))
WHOLE = 5 + 3 * (1 + 7 + 12)  # of three layers


def labelled(num_batches=2):
    return [batch(seed=seed) | {"labels": torch.arange(5) % 3} for seed in range(num_batches)]


def size(model):
    return sum(parameter.numel() for parameter in model.parameters())


def counts(plan):
    return [(len(heads), len(neurons)) for heads, neurons in zip(plan.kept, plan.neurons, strict=True)]


def value(plan, heads, neurons):
    kept = sum(float(heads[layer, head]) for layer, kept in enumerate(plan.kept) for head in kept)
    return kept + sum(float(neurons[layer][list(left)].sum()) for layer, left in enumerate(plan.neurons))


def best(heads, neurons, options, cost, limit):
    """The highest value of all plans that fit, by trying every number of heads and neurons of every layer."""
    worth = [
        {(h, n): float(a.sort(descending=True)[0][:h].sum() + f.sort(descending=True)[0][:n].sum()) for h, n in options}
        for a, f in zip(heads, neurons, strict=True)
    ]
    fitting = (layers for layers in itertools.product(options, repeat=len(neurons)) if cost(layers) <= limit)
    return max(sum(each[pair] for each, pair in zip(worth, layers, strict=True)) for layers in fitting)


@pytest.mark.parametrize("share", [0.3, 0.45, 0.6, 0.8, 1.0])
@pytest.mark.parametrize("is_uniform", [False, True], ids=["any", "per_layer"])
def test_the_plan_is_the_best_of_all_that_fit(share, is_uniform):
    layout = head_layout(tiny_bert())
    rng = torch.Generator().manual_seed(3)
    heads = torch.rand(3, 4, generator=rng, dtype=torch.float64)
    neurons = [torch.rand(64, generator=rng, dtype=torch.float64) / 16 for _ in range(3)]
    widths = (0, 16, 32, 48, 64)
    spending = Spending(layout, SECONDS, (tuple(range(5)),) * 3, (widths,) * 3, is_uniform)
    assert spending.whole == WHOLE
    plan = spending.plan(share * WHOLE, heads, neurons)
    if is_uniform:
        assert len(set(counts(plan))) == 1
    assert SECONDS.total(counts(plan)) <= share * WHOLE * (1 + 1e-8)
    pairs = list(itertools.product(range(5), widths))
    if is_uniform:
        fitting = [pair for pair in pairs if SECONDS.total([pair] * 3) <= share * WHOLE + 1e-9]
        expected = max(best(heads, neurons, [pair], SECONDS.total, np.inf) for pair in fitting)
    else:
        expected = best(heads, neurons, pairs, SECONDS.total, share * WHOLE + 1e-9)
    assert value(plan, heads, neurons) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("keep", [0.3, 0.5, 0.75, 1.0])
def test_a_share_of_parameters_or_flops_holds_for_the_model_that_was_cut(keep):
    model = tiny_bert()
    for budget, cost in (
        (Budget.parameters(keep=keep), size),
        (Budget.flops(keep=keep, at=Serving(2, 9)), lambda each: count_flops(each, 2, 9)),
    ):
        floor = 0.9 if keep == 0.3 and cost is size else keep  # of the tiny model, two fifths are embeddings
        budget = Budget.parameters(keep=floor) if cost is size else budget
        selector = MagnitudeSelector(budget=budget, neurons=True, neuron_step=4)
        plan = selector.select(model)
        reached = cost(prune_heads(model, plan)) / cost(model)
        assert floor - 0.03 <= reached <= floor
        assert all(heads >= 1 and neurons >= 4 and neurons % 4 == 0 for heads, neurons in counts(plan))


def test_a_larger_budget_is_never_worth_less():
    model = tiny_bert()
    selector = HisSelector(budget=Budget.flops(keep=0.9, at=Serving(2, 9)), neuron_step=4)
    selector.score(model, labelled())
    worth = [
        value(selector.plan(Budget.flops(keep=keep, at=Serving(2, 9))), selector.scores, selector.neuron_scores)
        for keep in np.linspace(0.2, 1, 17)
    ]
    assert worth == sorted(worth)


def test_what_is_kept_of_a_layer_is_its_best():
    model = tiny_bert()
    plan = MagnitudeSelector(budget=Budget.speedup(2, table=SECONDS), neuron_step=16).select(model)
    heads, neurons = weight_magnitude(model), neuron_magnitude(model)
    assert any(len(kept) < 4 for kept in plan.kept)
    assert any(len(left) < 64 for left in plan.neurons)
    for i, (kept, left) in enumerate(zip(plan.kept, plan.neurons, strict=True)):
        assert set(kept) == set(heads[i].argsort(descending=True)[: len(kept)].tolist())
        assert set(left) == set(neurons[i].argsort(descending=True)[: len(left)].tolist())
    with masked_heads(model, plan) as masked:
        expected = masked(**batch()).logits
    torch.testing.assert_close(prune_heads(model, plan)(**batch()).logits, expected)


def test_by_importance_heads_and_neurons_are_compared_as_they_are():
    model, batches = tiny_bert(), labelled()
    stats = collect_head_stats(model, batches, StatsRequest(importance=True, neurons=True))
    selector = HisSelector(budget=Budget.latency(target=0.6, table=SECONDS), neuron_step=16)
    plan = selector.select(model, batches)
    pairs = list(itertools.product(range(1, 5), (16, 32, 48, 64)))
    expected = best(stats.importance(), stats.neuron_importance(), pairs, SECONDS.total, 0.6 * WHOLE)
    assert value(plan, stats.importance(), stats.neuron_importance()) == pytest.approx(expected, rel=1e-12)
    assert HisSelector(budget=selector.budget, neuron_step=16).select(model, stats=stats) == plan


@pytest.mark.parametrize("build", [HisSelector, HiesSelector, EntropySelector, MagnitudeSelector, RandomSelector])
def test_every_selector_that_scores_neurons_spends_on_both(build):
    model = tiny_bert()
    for budget in (Budget.speedup(2, table=SECONDS), Budget.parameters(keep=0.9), Budget.fraction(0.5)):
        plan = build(budget=budget, neurons=True, neuron_step=8).select(model, labelled())
        assert plan.num_neurons == (64,) * 3
        assert plan.num_kept < 12 or plan.num_kept_neurons < 192
        if budget.kind == "fraction":
            assert (plan.num_kept, plan.num_kept_neurons) == (6, 96)
    assert build(budget=Budget.speedup(1.05, table=SECONDS), neurons=False).select(model, labelled()).neurons is None


def test_random_neurons_are_drawn_by_the_seed():
    budget = Budget.fraction(0.5)
    plans = [RandomSelector(budget=budget, neurons=True, neuron_step=8, seed=seed).select(tiny_bert()) for seed in (0, 1, 0)]
    assert plans[0].neurons != plans[1].neurons
    assert plans[0] == plans[2]


def test_half_of_both_in_every_layer():
    plan = MagnitudeSelector(budget=Budget.fraction(0.5), neurons=True, per_layer=True, neuron_step=8).select(tiny_bert())
    assert counts(plan) == [(2, 32)] * 3


def test_frozen_and_expert_layers_keep_what_they_have_and_are_paid_for():
    model = tiny_routed(1)
    model = prune_heads(model, KeepPlan((range(4), range(4), (1, 2)), 4))
    selector = MagnitudeSelector(budget=Budget.parameters(keep=0.85), neurons=True, neuron_step=4, frozen_layers=(0,))
    plan = selector.select(model)
    assert (plan.kept[0], plan.kept[2]) == ((0, 1, 2, 3), (1, 2))
    assert [len(left) for left in plan.neurons] == [64, len(plan.neurons[1]), 0]
    assert len(plan.neurons[1]) < 64
    assert 0.8 * size(model) < size(prune_heads(model, plan)) <= 0.85 * size(model)


def test_a_model_that_was_cut_is_cut_further_and_layers_may_lose_all():
    model = MagnitudeSelector(budget=Budget.fraction(0.5), neurons=True, neuron_step=8).select(tiny_bert())
    model = prune_heads(tiny_bert(), model)
    budget = Budget.flops(keep=0.1, at=Serving(2, 9))
    selector = MagnitudeSelector(budget=budget, min_heads_per_layer=0, min_neurons_per_layer=0, neuron_step=8)
    plan = selector.select(model)
    assert (0, 0) in counts(plan)
    assert count_flops(prune_heads(model, plan), 2, 9) <= 0.1 * count_flops(model, 2, 9)


def test_a_model_without_neurons_is_cut_by_its_heads_alone():
    model = prune_heads(tiny_bert(), KeepPlan.full(3, 4).with_neurons(((), (), ()), 64))
    for budget in (Budget.flops(keep=0.9, at=Serving(2, 9)), Budget.parameters(keep=0.9), Budget.fraction(0.5)):
        with pytest.raises(ValueError, match="^`model` has no FFN neurons left to choose: give the selector `neurons=False`"):
            MagnitudeSelector(budget=budget, neurons=True).select(model)
    plan = MagnitudeSelector(budget=Budget.flops(keep=0.9, at=Serving(2, 9)), neurons=False).select(model)
    assert 0.6 * count_flops(model, 2, 9) < count_flops(prune_heads(model, plan), 2, 9) <= 0.9 * count_flops(model, 2, 9)
    assert parameter_table(model).total([(4, 0)] * 3) == size(model)


# --- refusals ---


def test_a_target_below_what_is_reachable_names_the_best_before_anything_is_scored():
    def never():
        raise AssertionError("scored")
        yield

    # One head and 16 neurons a layer: 5 + 3 x (1 + 4 + 3) = 29 of 65.
    message = (
        "`budget` allows 6.5e+03 ms, 10.0% of the model as it is, but the least that can be reached is 2.9e+04 ms, 44.6%, a "
        "speed-up of 2.24x: raise it, lower `min_heads_per_layer` or `min_neurons_per_layer`, or let neurons go too "
        "(`neurons=True`)."
    )
    selector = HisSelector(budget=Budget.speedup(10, table=SECONDS), neuron_step=16)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        selector.select(tiny_bert(), never())
    reachable = HisSelector(budget=Budget.speedup(65 / 29, table=SECONDS), neuron_step=16)
    assert counts(reachable.select(tiny_bert(), labelled())) == [(1, 16)] * 3
    with pytest.raises(ValueError, match=re.escape("the least that can be reached is")):
        MagnitudeSelector(budget=Budget.parameters(target=100), neurons=True).select(tiny_bert())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: CahpSelector(budget=Budget.fraction(0.5), neurons=True),
            "CahpSelector scores no neurons: leave `neurons` out and give the budget a measurement "
            "(`Budget.latency(measure, ...)`), or take HisSelector.",
        ),
        (lambda: UsageSelector(budget=Budget.speedup(2)), "UsageSelector scores no neurons: leave `neurons` out"),
        (
            lambda: HisSelector(budget=Budget.heads(5), neurons=True),
            "`neurons=True` needs a budget that says how many neurons stay, which Budget.heads does not: take Budget.speedup",
        ),
        (
            lambda: HisSelector(budget=Budget.latency(lambda plan: 1.0, target=2), neurons=True),
            "`neurons=True` needs a budget that says how many neurons stay, which Budget.latency does not",
        ),
        (
            lambda: HisSelector(budget=Budget.fraction(0.5), neuron_step=0),
            "`neuron_step` must be a whole number from 1, got 0.",
        ),
        (
            lambda: HisSelector(budget=Budget.fraction(0.5), min_neurons_per_layer=-1),
            "`min_neurons_per_layer` must be a whole number from 0, got -1.",
        ),
        (
            lambda: MagnitudeSelector(budget=Budget.speedup(2, table=SECONDS)).select(tiny_bert(num_attention_heads=8)),
            "The table prices 0 to 4 heads, got 5: it is of another model.",
        ),
    ],
)
def test_bad_input_is_refused(build, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build()


def test_a_table_of_another_machine_is_used_where_it_is_named_and_said_so(monkeypatch):
    said = []
    monkeypatch.setattr(measured.logger, "warning_once", said.append)
    for machine in (environment()["machine"], "64 x another processor"):
        table = replace(SECONDS, about={"machine": machine})
        MagnitudeSelector(budget=Budget.speedup(1.5, table=table), neuron_step=16).select(tiny_bert())
    assert len(said) == 1
    assert "was measured on another machine (64 x another processor)" in said[0]


def test_tables_agree_with_what_a_budget_of_their_kind_counts():
    model = tiny_bert()
    by_table = MagnitudeSelector(budget=Budget.flops(keep=0.6, at=Serving(2, 9)), neuron_step=4).select(model)
    given = Budget("flops", keep=0.6, table=flop_table(model, Serving(2, 9)))
    assert MagnitudeSelector(budget=given, neuron_step=4).select(model) == by_table
    assert parameter_table(model).total([(4, 64)] * 3) == size(model)
