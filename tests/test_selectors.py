"""Selectors score by their formula, spend the budget by the rules, and leave the model alone."""

import re
from dataclasses import dataclass

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, ViTConfig, ViTForImageClassification

from shrp_hf.models.configuration_shrp_bert import ShrpBertConfig
from shrp_hf.models.modeling_shrp_bert import ShrpBertForSequenceClassification
from shrp_hf.plans.budget import Budget
from shrp_hf.plans.keep_plan import KeepPlan
from shrp_hf.pruning import prune_heads
from shrp_hf.scoring import StatsRequest, collect_head_stats
from shrp_hf.selectors import (
    SELECTORS,
    CahpSelector,
    EntropySelector,
    HiesSelector,
    HisSelector,
    MagnitudeSelector,
    RandomSelector,
    Selector,
    UsageSelector,
)
from shrp_hf.selectors.base import min_max

LAYERS, HEADS = 4, 4
CONFIG = {
    "hidden_size": 16,
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "intermediate_size": 8,
    "vocab_size": 40,
    "num_labels": 3,
    "initializer_range": 0.3,
}
POSTHOC = sorted(set(SELECTORS) - {"usage"})
CLUSTERING = {"cahp", "cahp-direct"}  # their count is of clusters
OPTIONS = {"cahp": {"signature_size": 8, "max_iter": 300}, "cahp-direct": {"signature_size": 8}}


def exact(message):
    return f"^{re.escape(message)}$"


def bert():
    return BertForSequenceClassification(BertConfig(**CONFIG))


def text_batches(num_batches=4):
    batches = []
    for _ in range(num_batches):
        mask = (torch.arange(7) < torch.randint(2, 8, (6, 1))).long()
        tokens = torch.randint(2, 40, (6, 7))
        batches.append({"input_ids": tokens, "attention_mask": mask, "labels": torch.arange(6) % 3})
    return batches


def build(name, budget, **options):
    extra = OPTIONS.get(name, {})
    return SELECTORS[name](budget=budget, **extra, **options)


@dataclass(kw_only=True, eq=False)
class FixedSelector(Selector):
    """Scores that the test gives."""

    name = "fixed"
    given: torch.Tensor

    def _scored(self, model, stats):
        return self.given


RISING = torch.arange(16.0, dtype=torch.float64).view(LAYERS, HEADS)  # the last layer is the best


def fixed(budget, given=RISING, **options):
    selector = FixedSelector(budget=budget, given=given, **options)
    return selector.select(bert()).kept, selector


@pytest.mark.parametrize("name", POSTHOC)
def test_every_selector_returns_a_plan_and_leaves_the_model(name):
    model = bert().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    selector = build(name, Budget.fraction(0.5))
    plan = selector.select(model, text_batches())
    assert plan.num_heads == HEADS
    assert plan.num_layers == LAYERS
    assert plan.num_kept == 8 or (name in CLUSTERING and plan.num_kept > 8)
    assert all(plan.kept)
    assert selector.scores.shape == (LAYERS, HEADS)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert model.training
    assert model.config._attn_implementation == "sdpa"
    assert SELECTORS[name].name == name


@pytest.mark.parametrize("name", POSTHOC)
def test_every_selector_is_reproducible(name):
    model, batches = bert(), text_batches()
    plans = [build(name, Budget.heads(6)).select(model, batches) for _ in range(2)]
    assert plans[0] == plans[1]


def test_images_have_no_attention_mask():
    model = ViTForImageClassification(
        ViTConfig(**{k: v for k, v in CONFIG.items() if k != "vocab_size"}, image_size=8, patch_size=4)
    )
    batches = [{"pixel_values": torch.randn(6, 3, 8, 8), "labels": torch.arange(6) % 3} for _ in range(2)]
    for name in POSTHOC:
        assert build(name, Budget.heads(6)).select(model, batches).num_kept >= 6


def test_one_pass_serves_several_selectors():
    model, batches = bert(), text_batches()
    chosen = [build(name, Budget.heads(6)) for name in POSTHOC]
    request = StatsRequest()
    for selector in chosen:
        request |= selector.request
    stats = collect_head_stats(model, batches, request)
    for selector in chosen:
        assert selector.select(model, stats=stats) == build(selector.name, Budget.heads(6)).select(model, batches)


# --- spending the budget ---


def test_every_layer_keeps_its_best_head_and_the_rest_is_global():
    assert fixed(Budget.heads(5))[0] == ((3,), (3,), (3,), (2, 3))


def test_without_a_minimum_layers_may_lose_all_heads():
    assert fixed(Budget.heads(5), min_heads_per_layer=0)[0] == ((), (), (3,), (0, 1, 2, 3))


def test_a_higher_minimum():
    assert fixed(Budget.heads(9), min_heads_per_layer=2)[0] == ((2, 3), (2, 3), (2, 3), (1, 2, 3))


def test_per_layer_spreads_evenly_and_the_rest_goes_to_the_best():
    assert fixed(Budget.heads(10), per_layer=True)[0] == ((2, 3), (2, 3), (1, 2, 3), (1, 2, 3))
    assert fixed(Budget.fraction(0.5), per_layer=True)[0] == ((2, 3),) * 4


def test_frozen_layers_keep_all_heads_beside_the_budget():
    kept, selector = fixed(Budget.fraction(0.5), frozen_layers=[0, 3])
    assert kept == ((0, 1, 2, 3), (3,), (1, 2, 3), (0, 1, 2, 3))
    assert selector.plan(Budget.heads(2)).kept == ((0, 1, 2, 3), (3,), (3,), (0, 1, 2, 3))


def test_ties_go_to_the_lower_index():
    assert fixed(Budget.heads(5), torch.zeros(LAYERS, HEADS))[0] == ((0, 1), (0,), (0,), (0,))


def test_another_budget_needs_no_second_pass():
    _, selector = fixed(Budget.heads(5))
    assert selector.plan(Budget.heads(16)) == KeepPlan.full(LAYERS, HEADS)


def test_heads_that_are_gone_stay_gone_and_expert_layers_stay():
    config = ShrpBertConfig(**CONFIG, expert_layers=[3], routed=False)
    config.kept_heads = [[1, 3], [0, 1, 2, 3], [], [0, 2]]
    model = ShrpBertForSequenceClassification(config)
    for name in sorted(set(POSTHOC) - CLUSTERING):
        plan = build(name, Budget.heads(3)).select(model, text_batches())
        assert plan.num_kept == 5
        assert plan.kept[2:] == ((), (0, 2))
        assert set(plan.kept[0]) <= {1, 3}
        prune_heads(model, plan)


@pytest.mark.parametrize("options", [{"target": 13000}, {"keep": 0.9}], ids=["target", "share"])
def test_parameters_are_those_of_the_cut_model(options):
    model = bert()
    total = model.num_parameters()
    budget = Budget.parameters(**options)
    plan = FixedSelector(budget=budget, given=RISING, min_heads_per_layer=0).select(model)
    limit = options.get("target", 0.9 * total)
    count = prune_heads(model, plan).num_parameters()
    per_head = 3 * 4 * 17 + 4 * 16
    assert count == total - (16 - plan.num_kept) * per_head
    assert count <= limit < count + per_head


def test_quality_budget_keeps_as_few_heads_as_hold_it():
    kept, selector = fixed(Budget.quality(lambda plan: 1.0 if 2 in plan.kept[3] else 0.5))
    assert kept == ((3,), (3,), (3,), (2, 3))
    assert selector.measured[16] == 1.0
    assert selector.measured[5] == 1.0
    assert selector.measured[4] == 0.5


def test_latency_budget_counts_heads_that_fit():
    kept, _ = fixed(Budget.latency(lambda plan: plan.num_kept / 100, keep=0.5))
    assert sum(map(len, kept)) == 8


@pytest.mark.parametrize("name", POSTHOC)
def test_a_knee_of_measured_quality_suits_every_selector(name):
    # A step up to 8 heads: the knee must be found there, whoever orders the heads.
    selector = build(name, Budget.knee(4, evaluate=lambda plan: 1 - 2 ** (-plan.num_kept / 2)))
    plan = selector.select(bert(), text_batches())
    assert 4 <= plan.num_kept <= 12
    assert len(selector.measured) > 10


# --- scores ---


def test_min_max_ignores_missing_heads_and_survives_equal_scores():
    scores = min_max(torch.tensor([[1.0, torch.nan], [3.0, 2.0]]))
    torch.testing.assert_close(scores, torch.tensor([[0, torch.nan], [1, 0.5]]), equal_nan=True)
    assert min_max(torch.ones(2, 2)).tolist() == [[0, 0], [0, 0]]


def silent():
    """A model whose loss no head can change."""
    model = bert()
    torch.nn.init.zeros_(model.classifier.weight)
    return model


@pytest.mark.parametrize("selector_class", [HisSelector, HiesSelector])
def test_importance_of_zero_is_refused(selector_class):
    selector = selector_class(budget=Budget.heads(6))
    message = (
        "The importance of every head is 0, which chooses nothing: check that the model has learned the task, that the "
        "batches carry its labels, and that some of them are hard enough to give a gradient; score in float32, or take a "
        "selector that needs no gradient (entropy, magnitude, random)."
    )
    with pytest.raises(ValueError, match=exact(message)):
        selector.select(silent(), text_batches())
    with pytest.raises(ValueError, match="Nothing is scored yet"):
        selector.plan()
    assert EntropySelector(budget=Budget.heads(6)).select(silent(), text_batches()).num_kept == 6


@pytest.mark.parametrize(("value", "found"), [(0.0, "every head is 0"), (torch.inf, "a head is infinite")])
def test_weights_that_tell_nothing_are_refused(value, found):
    model = bert()
    for layer in model.bert.encoder.layer:
        attention = layer.attention
        for module in (attention.self.query, attention.self.key, attention.self.value, attention.output.dense):
            torch.nn.init.constant_(module.weight, value)
    with pytest.raises(ValueError, match=f"^The weight magnitude of {found}, which chooses nothing: "):
        MagnitudeSelector(budget=Budget.heads(6)).select(model)


def test_undefined_quality_is_never_the_best_alpha():
    model, batches = bert(), text_batches()
    grid = {0.0: float("nan"), 0.5: 0.25, 0.9: 0.5}
    values = iter(grid.values())
    selector = HiesSelector(budget=Budget.heads(6), alpha="search", grid=tuple(grid), evaluate=lambda plan: next(values))
    selector.select(model, batches)
    assert selector.best_alpha == 0.9
    selector = HiesSelector(budget=Budget.heads(6), alpha="search", evaluate=lambda plan: float("nan"))
    with pytest.raises(ValueError, match="^`evaluate` gives NaN for every alpha of `grid`"):
        selector.select(model, batches)


@pytest.mark.parametrize("name", ["entropy", "hies", "his", "magnitude"])
def test_one_head_a_layer_has_finite_scores(name):
    model = BertForSequenceClassification(BertConfig(**CONFIG | {"num_attention_heads": 1}))
    selector = SELECTORS[name](budget=Budget.heads(2), min_heads_per_layer=0)
    assert selector.select(model, text_batches()).num_kept == 2
    assert selector.scores.isfinite().all()


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.9])
def test_hies_follows_its_formula(alpha):
    model, batches = bert(), text_batches()
    selector = HiesSelector(budget=Budget.heads(6), alpha=alpha)
    selector.select(model, batches)
    stats = collect_head_stats(model, batches, StatsRequest(importance=True, entropy=True))
    his, entropy = stats.importance(), stats.entropy()
    his = (his - his.min()) / (his.max() - his.min())
    entropy = (entropy - entropy.min()) / (entropy.max() - entropy.min())
    torch.testing.assert_close(selector.scores, alpha * his + (1 - alpha) * (1 - entropy))
    assert selector.best_alpha == alpha


def test_entropy_keeps_focused_heads():
    model, batches = bert(), text_batches()
    for layer in model.bert.encoder.layer:  # head 0 cannot tell keys apart: uniform attention, entropy 1
        layer.attention.self.query.weight.data[:4] = 0
        layer.attention.self.query.bias.data[:4] = 0
    plan = EntropySelector(budget=Budget.heads(12)).select(model, batches)
    assert plan.kept == ((1, 2, 3),) * LAYERS


def test_alpha_is_searched_on_the_callers_split():
    model, batches = bert(), text_batches()
    wanted = HiesSelector(budget=Budget.heads(6), alpha=0.8).select(model, batches)
    selector = HiesSelector(budget=Budget.heads(6), alpha="search", grid=(0.0, 0.8, 0.9), evaluate=lambda plan: plan == wanted)
    assert selector.select(model, batches) == wanted
    assert selector.best_alpha == 0.8
    assert selector.alpha_curve[0.8] == 1
    assert list(selector.alpha_curve) == [0.0, 0.8, 0.9]


def test_his_normalised_per_layer():
    model, batches = bert(), text_batches()
    plain, normalised = (HisSelector(budget=Budget.heads(6), per_layer_normalisation=on) for on in (False, True))
    for selector in (plain, normalised):
        selector.select(model, batches)
    torch.testing.assert_close(normalised.scores, torch.nn.functional.normalize(plain.scores, dim=1))


def test_granularities_differ():
    model, batches = bert(), text_batches()
    scores = [
        HisSelector(budget=Budget.heads(6), granularity=granularity).score(model, batches)
        for granularity in ("sample", "token", "batch")
    ]
    assert (scores[0] > scores[2]).all()  # the mean of absolute values is above the absolute value of the mean
    assert not torch.allclose(scores[0], scores[1])


def test_magnitude_equals_a_loop():
    model = bert()
    scores = MagnitudeSelector(budget=Budget.heads(6)).score(model)
    for i, layer in enumerate(model.bert.encoder.layer):
        for head in range(HEADS):
            rows = slice(4 * head, 4 * head + 4)
            attention = layer.attention
            parts = [getattr(attention.self, name).weight[rows] for name in ("query", "key", "value")]
            parts.append(attention.output.dense.weight[:, rows])
            expected = sum(part.square().sum() for part in parts) ** 0.5
            assert scores[i, head].item() == pytest.approx(expected.item(), rel=1e-5)


def test_random_depends_on_the_seed_alone():
    first = RandomSelector(budget=Budget.heads(6), seed=1).select(bert())
    torch.manual_seed(5)
    assert RandomSelector(budget=Budget.heads(6), seed=1).select(bert()) == first
    assert RandomSelector(budget=Budget.heads(6), seed=2).select(bert()) != first


# --- usage ---


def routed(usage):
    model = ShrpBertForSequenceClassification(ShrpBertConfig(**CONFIG, expert_layers=[2, 3]))
    for layer, counts in usage.items():
        model.layers[layer].router.usage.copy_(torch.tensor(counts))
    return model


def test_usage_keeps_the_experts_that_were_chosen_most():
    model = routed({2: [5, 1, 9, 0], 3: [0, 0, 1, 9]})
    everything = (0, 1, 2, 3)
    selector = UsageSelector(budget=Budget.heads(2))
    assert selector.select(model).kept == (everything, everything, (2,), (3,))
    assert selector.plan(Budget.heads(3)).kept == (everything, everything, (0, 2), (3,))
    assert selector.plan(Budget.fraction(0.5)).kept == (everything, everything, (0, 2), (2, 3))
    torch.testing.assert_close(selector.scores[3], torch.tensor([0, 0, 0.1, 0.9], dtype=torch.float64))
    assert selector.scores[:2].isnan().all()
    overall = UsageSelector(budget=Budget.heads(2), per_layer=False, min_heads_per_layer=0)
    assert overall.select(model).kept == (everything, everything, (2,), (3,))
    assert overall.plan(Budget.heads(3)).kept == (everything, everything, (0, 2), (3,))


def test_usage_that_is_missing_is_refused():
    message = (
        "No usage is recorded for expert layer 3: train the model with ShrpTrainer, or count on a dataset with "
        "`trainer.usage_plan(dataset)`."
    )
    with pytest.raises(ValueError, match=exact(message)):
        UsageSelector(budget=Budget.heads(2)).select(routed({2: [1, 0, 0, 0]}))
    message = (
        "`model` has no routed expert layers, so no usage: load it with `from_pretrained(..., expert_layers=n)` and "
        "train it, or take another selector."
    )
    with pytest.raises(ValueError, match=exact(message)):
        UsageSelector(budget=Budget.heads(2)).select(bert())


# --- bad input ---

HEADS_5 = Budget.heads(5)
PLAIN = "Budget.heads, Budget.fraction, Budget.parameters, Budget.flops, Budget.latency, Budget.quality"
BAD = {
    "knee": (
        lambda: HiesSelector(budget=Budget.knee()),
        f"HiesSelector does not take Budget.knee: it takes {PLAIN} (a knee of measured quality, "
        "Budget.knee(evaluate=...), suits all).",
    ),
    "quality for CAHP": (
        lambda: CahpSelector(budget=Budget.quality(len)),
        "CahpSelector does not take Budget.quality: it takes Budget.knee, Budget.heads, Budget.fraction.",
    ),
    "parameters for usage": (
        lambda: UsageSelector(budget=Budget.parameters(keep=0.5)),
        "UsageSelector does not take Budget.parameters: it takes Budget.heads, Budget.fraction, Budget.flops, "
        "Budget.latency, Budget.quality.",
    ),
    "no budget": (
        lambda: HisSelector(budget=0.5),
        "`budget` must be a Budget, such as Budget.fraction(0.5), got 0.5.",
    ),
    "per layer for CAHP": (
        lambda: CahpSelector(budget=HEADS_5, per_layer=True),
        "`per_layer=True` does not suit CAHP: its clusters reach over layers. Take another selector.",
    ),
    "minimum": (
        lambda: HisSelector(budget=HEADS_5, min_heads_per_layer=-1),
        "`min_heads_per_layer` must be a whole number from 0, got -1.",
    ),
    "granularity": (
        lambda: HisSelector(budget=HEADS_5, granularity="word"),
        "`granularity` must be one of sample, token, batch, got 'word'.",
    ),
    "alpha": (
        lambda: HiesSelector(budget=HEADS_5, alpha=1.0),
        '`alpha` must be in [0, 1) or "search", got 1.0.',
    ),
    "alpha name": (
        lambda: HiesSelector(budget=HEADS_5, alpha="best"),
        "`alpha` must be in [0, 1) or \"search\", got 'best'.",
    ),
    "search without evaluation": (
        lambda: HiesSelector(budget=HEADS_5, alpha="search"),
        '`alpha="search"` needs `evaluate`, a callable that takes a plan and returns its quality.',
    ),
    "search under quality": (
        lambda: HiesSelector(budget=Budget.quality(len), alpha="search", evaluate=len).select(bert(), text_batches()),
        '`alpha="search"` compares plans of one size, which Budget.quality does not fix: give alpha.',
    ),
    "frozen layer": (
        lambda: fixed(HEADS_5, frozen_layers=[4]),
        "`frozen_layers` names layer 4, but the model's layers are 0 to 3.",
    ),
    "all frozen": (
        lambda: fixed(HEADS_5, frozen_layers=range(4)),
        "`frozen_layers` [0, 1, 2, 3] leave no head to choose.",
    ),
    "below the minimum": (
        lambda: fixed(Budget.heads(5), min_heads_per_layer=2),
        "`budget` keeps 5 heads, but `min_heads_per_layer=2` and the 16 heads to choose from allow 8 to 16.",
    ),
    "too many": (
        lambda: fixed(Budget.heads(17)),
        "`budget` keeps 17 heads, but must keep 1 to 16: so many are to choose from.",
    ),
    "no batches": (
        lambda: HisSelector(budget=HEADS_5).select(bert()),
        "`HisSelector` needs calibration data: give `batches` or `stats`.",
    ),
    "plan first": (
        lambda: HisSelector(budget=HEADS_5).plan(),
        "Nothing is scored yet: call `select` or `score` with a model first.",
    ),
    "CAHP's points first": (
        lambda: CahpSelector(budget=HEADS_5).points,
        "Nothing is scored yet: call `select` or `score` with a model first.",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_options_are_refused(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=exact(message)):
        call()


def test_statistics_of_another_pass_or_model_are_refused():
    model, batches = bert(), text_batches()
    stats = collect_head_stats(model, batches, StatsRequest(entropy=True))
    with pytest.raises(ValueError, match=r"^`stats` measured .*entropy=True.*, but HisSelector needs .*importance=True"):
        HisSelector(budget=HEADS_5).select(model, stats=stats)
    smaller = ShrpBertForSequenceClassification(ShrpBertConfig(**CONFIG, kept_heads=[[0], [1], [2], [3]]))
    message = "`stats` are those of a model with other heads: score this model."
    with pytest.raises(ValueError, match=exact(message)):
        EntropySelector(budget=HEADS_5).select(smaller, stats=stats)
