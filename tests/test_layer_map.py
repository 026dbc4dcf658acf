"""Heads and neurons of every family: cut equals masked, loaded equals saved, back to stock equals cut, ONNX equals PyTorch."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification

from shrp_hf import KeepPlan, masked_heads, prune_heads, to_shrp, to_stock
from shrp_hf.families import FAMILIES, head_layout
from shrp_hf.models.slicing import OutputMeans
from tests.test_families import ALL, ATTENTIONS, EAGER_ONLY, EXACT, TABLE, inputs, outputs, stock
from tests.tiny import assert_near, force_experts_, same_state, tiny_routed

EVERY = tuple(range(64))
SOME = (tuple(range(3, 40)), EVERY, (5, 60))
WHOLE = KeepPlan.full(3, 4)
PLANS = {
    "neurons": WHOLE.with_neurons(SOME, 64),
    "both": KeepPlan(((0, 2), ALL, (3,)), 4, SOME, 64),
    "no neurons": WHOLE.with_neurons(((), EVERY, ()), 64),
    "neither": KeepPlan(((1,), (), (0, 1, 2)), 4, ((0, 63), (), EVERY), 64),
    "no heads": KeepPlan(((), ALL, ()), 4, (SOME[0], (), EVERY), 64),
}
CASES = [
    (*case, padding)
    for case in ATTENTIONS
    for padding in (("left", "right") if case[0] != "vit" else (None,))
    if case[0] not in ("xlm-roberta", "camembert") or (*case[1:], padding) == ("sdpa", "left")  # RoBERTa under other names
]
WITHOUT_OUTPUT_BIAS = ("modernbert", "nomic_bert")


def silenced(model, plan, means=None):
    """The reference: a copy with zero columns where what is not kept comes in, and its mean contribution in the bias."""
    model = copy.deepcopy(model)
    layout = head_layout(model)
    for i in range(3):
        gone_heads = [h * 8 + k for h in ALL if h not in plan.kept[i] for k in range(8)]
        gone_neurons = sorted(set(EVERY) - set(plan.neurons[i]))
        for module, gone, mean in (
            (layout.output(i), gone_heads, means and means.heads[i].flatten()),
            (layout.neurons_out(i), gone_neurons, means and means.neurons[i]),
        ):
            if means is not None:
                if module.bias is None:
                    module.bias = nn.Parameter(module.weight.new_zeros(32))
                module.bias.data += module.weight.data[:, gone] @ mean[gone]
            module.weight.data[:, gone] = 0
    return model


def drawn_means(seed=3):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    return OutputMeans(tuple(draw(4, 8) for _ in range(3)), tuple(draw(64) for _ in range(3)))


# --- cut == masked ---


@pytest.mark.parametrize(
    ("family", "attention", "padding", "plan"),
    # Every plan with padding on the left; where there is padding on the right, of heads and neurons.
    [(*case, plan) for case in CASES for plan in PLANS if case[-1] != "right" or plan == "both"],
)
def test_cut_equals_masked_and_back_to_stock_equals_cut(family, attention, padding, plan):
    model, plan = stock(family, attention=attention), PLANS[plan]
    with_means = plan in (PLANS["both"], PLANS["neither"])
    for means in (None, drawn_means()) if with_means else (None,):
        expected = outputs(silenced(model, plan, means), family, padding)
        assert not torch.allclose(expected, outputs(model, family, padding), rtol=0, atol=1e-3)
        with masked_heads(model, plan, means):
            torch.testing.assert_close(outputs(model, family, padding), expected, **EXACT)
        cut = prune_heads(model, plan, means)
        torch.testing.assert_close(outputs(cut, family, padding), expected, **EXACT)
        if attention == "sdpa" or family in EAGER_ONLY:
            if means is None or family not in WITHOUT_OUTPUT_BIAS:
                torch.testing.assert_close(outputs(to_stock(cut), family, padding), expected, **EXACT)
            else:
                with pytest.raises(ValueError, match="left a bias in output matrices that have none"):
                    to_stock(cut)
        layout = head_layout(cut)
        assert layout.kept == plan.kept
        assert layout.num_neurons == tuple(len(kept) for kept in plan.neurons)
        assert cut.num_parameters() < model.num_parameters()


@pytest.mark.parametrize("family", TABLE)
def test_cut_model_trains(family):
    model = prune_heads(stock(family), PLANS["neither"]).train()
    size = len(next(iter(inputs(family).values())))
    model(**inputs(family), labels=torch.zeros(size, dtype=torch.long)).loss.backward()
    without = {name.partition(".weight")[0].partition(".bias")[0] for name, p in model.named_parameters() if p.grad is None}
    # Where a part of a layer begins with a norm and is not there, nothing reads that norm.
    unread = {"vit": {f"vit.layers.1.layernorm_{where}" for where in ("before", "after")}}
    unread["modernbert"] = {f"model.layers.1.{part}_norm" for part in ("attn", "mlp")}
    assert without == unread.get(family, set())


@pytest.mark.parametrize("family", TABLE)
def test_cutting_in_two_steps_equals_one_composed_cut(family):
    first = KeepPlan(((0, 1, 3), ALL, (1, 2, 3)), 4, (tuple(range(0, 64, 2)), EVERY, tuple(range(10, 60))), 64)
    second = KeepPlan(((0, 3), (1,), ()), 4, (tuple(range(1, 32, 3)), (), tuple(range(0, 50, 7))), (32, 64, 50))
    once = prune_heads(stock(family), first.then(second))
    half = prune_heads(stock(family), first)
    with masked_heads(half, second):
        torch.testing.assert_close(outputs(half, family), outputs(once, family), **EXACT)
    twice = prune_heads(half, second)
    assert same_state(twice, once)
    assert twice.config.to_dict() == once.config.to_dict()
    assert twice.config.intermediate_sizes == [11, 0, 8]
    half.prune_heads(second)
    assert same_state(half, once)


@pytest.mark.parametrize("family", TABLE)
@pytest.mark.parametrize("plan", ["both", "neither"])
def test_saved_equals_loaded(tmp_path, family, plan):
    cut = prune_heads(stock(family), PLANS[plan], drawn_means())
    cut.save_pretrained(tmp_path)
    auto = AutoModelForImageClassification if family == "vit" else AutoModelForSequenceClassification
    loaded, info = auto.from_pretrained(tmp_path, dtype=torch.float64, output_loading_info=True)
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert same_state(loaded, cut)
    torch.testing.assert_close(outputs(loaded, family), outputs(cut, family), **EXACT)
    assert (loaded.config.format_version, loaded.config.intermediate_sizes) == (2, cut.config.intermediate_sizes)


@pytest.mark.parametrize("family", ["roberta", "distilbert", "vit"])
@pytest.mark.parametrize("plan", ["both", "neither"])
def test_cut_model_exports(family, plan):
    model = prune_heads(stock(family), PLANS[plan])
    exported = torch.export.export(model, (), inputs(family)).module()
    torch.testing.assert_close(exported(**inputs(family))["logits"].flatten(), outputs(model, family), **EXACT)


def test_layer_without_neurons_adds_the_output_bias():
    for family in set(TABLE) - set(WITHOUT_OUTPUT_BIAS):
        model = prune_heads(stock(family), PLANS["no neurons"])
        path = FAMILIES[model.config.model_type].neurons_out
        output = model.layers[0].get_submodule(path)
        assert list(output.state_dict()) == ["bias"]
        before = outputs(model, family)
        output.bias.data *= -3
        assert not torch.allclose(outputs(model, family), before, atol=1e-3)


@pytest.mark.parametrize("family", TABLE)
def test_equal_widths_make_a_small_stock_model(family, tmp_path):
    plan = WHOLE.with_neurons(((1, 5, 9), (0, 1, 2), (61, 62, 63)), 64)
    cut = prune_heads(stock(family), plan)
    plain = to_stock(cut, compact=True)
    plain.save_pretrained(tmp_path)
    loaded = type(stock(family)).from_pretrained(tmp_path, dtype=torch.float64)
    assert loaded.num_parameters() == cut.num_parameters()
    torch.testing.assert_close(outputs(loaded, family), outputs(cut, family), **EXACT)


@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name in TABLE if name not in (*EAGER_ONLY, "xlm-roberta", "camembert")])
def test_cut_equals_masked_in_flex_attention(family):
    """It compiles, and has no float64 on a CPU: so against eager in float64, to rounding."""
    plan, padding = PLANS["both"], None if family == "vit" else "right"
    model = stock(family, dtype=torch.float32)
    expected = outputs(silenced(copy.deepcopy(model).double(), plan), family, padding)
    cut = prune_heads(model, plan)
    cut.set_attn_implementation("flex_attention")
    assert_near(outputs(cut, family, padding), expected)


# --- beside expert layers ---


def test_neurons_are_cut_beside_expert_layers():
    model = tiny_routed([2], dtype=torch.float64)
    force_experts_(model, 2, [1])
    plan = KeepPlan(((0, 2), ALL, ALL), 4, (SOME[0], (), ()), (64, 64, 0))
    with masked_heads(model, plan):
        masked = outputs(model, "bert")
    static = prune_heads(model, KeepPlan((*plan.kept[:2], (1,)), 4, plan.neurons, 64))
    torch.testing.assert_close(outputs(static, "bert"), masked, **EXACT)
    assert static.config.intermediate_sizes == [37, 0, 0]


@pytest.mark.parametrize("pending", [False, True])
def test_thin_layers_convert_to_experts(pending, tmp_path):
    model = prune_heads(stock("bert"), PLANS["no neurons"])
    model.convert_layers_([1, 2], pending=pending)
    if pending:
        assert model.config.intermediate_sizes == [0, 64, 0]
        before = outputs(prune_heads(stock("bert"), PLANS["no neurons"]), "bert")
        torch.testing.assert_close(outputs(model, "bert"), before, **EXACT)
        model.save_pretrained(tmp_path)
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float64)
        for layer in (1, 2):
            model.activate_layer_(layer)
        model.finish_conversion_()
    assert model.config.intermediate_sizes == [0, 0, 0]
    said = outputs(model, "bert")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float64)
    assert torch.equal(outputs(loaded, "bert"), said)
    assert torch.equal(outputs(to_shrp(loaded), "bert"), said)
