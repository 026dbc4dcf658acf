"""Changing a model in place: converting layers, cutting heads and experts, and what is refused."""

import copy
import re

import pytest
import torch

from shrp_hf.models.modeling_shrp_bert import ShrpBertForSequenceClassification
from shrp_hf.plans.keep_plan import KeepPlan
from shrp_hf.pruning import prune_heads, to_shrp
from tests.tiny import batch, same_state, tiny_bert, tiny_routed

ALL = (0, 1, 2, 3)
EXACT = {"rtol": 0, "atol": 1e-10}


def logits_of(model, padding="right"):
    with torch.no_grad():
        return model(**batch(padding)).logits


def static_model():
    return prune_heads(tiny_routed(2), KeepPlan((ALL, (2,), (0, 3)), 4))


# --- conversion ---


@pytest.mark.parametrize(("given", "expected"), [(1, [2]), (3, [0, 1, 2]), ([0], [0]), ((2, 1), [1, 2])], ids=str)
def test_converts_the_layers_that_were_named(given, expected):
    model = ShrpBertForSequenceClassification.from_stock(tiny_bert())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.convert_layers_(given)
    assert (model.config.expert_layers, model.config.pending_layers, model.config.routed) == (expected, [], True)
    assert sorted(model.usage()) == expected
    after = model.state_dict()
    for name in before:  # what stays is as it was: other layers, and Q, K, V of the experts
        left = re.search(rf"layer\.[{''.join(map(str, expected))}]\.(attention\.output|intermediate|output)", name)
        assert (name not in after) if left else torch.equal(after[name], before[name])
    weight = before[f"bert.encoder.layer.{expected[0]}.attention.output.dense.weight"]
    expander = model.layers[expected[0]].expander
    torch.testing.assert_close(expander.dense.weight, weight.view(32, 4, 8).mean(dim=1) * 2)


def test_conversion_in_steps_ends_where_conversion_at_once_ends():
    at_once, in_steps = (ShrpBertForSequenceClassification.from_stock(tiny_bert()) for _ in range(2))
    torch.manual_seed(5)
    at_once.convert_layers_([1, 2])
    torch.manual_seed(5)
    in_steps.convert_layers_([1, 2], pending=True)
    assert (in_steps.config.pending_layers, in_steps.config.expert_layers) == ([1, 2], [])
    assert torch.equal(logits_of(in_steps), logits_of(tiny_bert()))  # what waits runs as it did
    in_steps.activate_layer_(2)
    assert len(in_steps(**batch()).router_logits) == 1
    in_steps.activate_layer_(1)
    in_steps.finish_conversion_()
    assert in_steps.config.to_dict() == at_once.config.to_dict()
    assert same_state(in_steps, at_once)
    assert torch.equal(logits_of(in_steps), logits_of(at_once))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_precision_survives_conversion_and_pruning(dtype):
    model = tiny_routed(2, dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    model.prune_heads(KeepPlan(((), (1,), (1, 2)), 4))
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model(**batch()).logits.dtype == dtype


def test_frozen_weights_stay_frozen():
    model = tiny_routed(2)
    model.bert.requires_grad_(False)
    model.prune_heads(KeepPlan(((0, 2), (1,), (1, 2)), 4))
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {"classifier.weight", "classifier.bias"}


def test_layer_classes_are_listed_as_they_are():
    model = ShrpBertForSequenceClassification.from_stock(tiny_bert())
    assert model._no_split_modules == {"BertEmbeddings", "BertLayer"}
    model.convert_layers_(2)
    assert model._no_split_modules == {"BertEmbeddings", "BertLayer", "ExpertLayer"}
    model.convert_layers_([0])
    assert model._no_split_modules == {"BertEmbeddings", "ExpertLayer"}


# --- pruning ordinary layers ---


def masked_(model, layer, removed):
    weight = model.get_submodule(f"bert.encoder.layer.{layer}.attention.output.dense").weight
    with torch.no_grad():
        for head in removed:
            weight[:, head * 8 : (head + 1) * 8] = 0


@pytest.mark.parametrize("padding", [None, "right", "left"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_pruned_is_masked(attention, padding):
    stock = tiny_bert(dtype=torch.float64, attn_implementation=attention)
    state = copy.deepcopy(stock.state_dict())
    pruned = prune_heads(stock, KeepPlan(((0, 3), (), (1,)), 4))
    assert all(torch.equal(state[name], value) for name, value in stock.state_dict().items())
    assert isinstance(pruned, ShrpBertForSequenceClassification)
    for layer, removed in ((0, (1, 2)), (1, ALL), (2, (0, 2, 3))):
        masked_(stock, layer, removed)
    torch.testing.assert_close(logits_of(pruned, padding), logits_of(stock, padding), **EXACT)
    names = [name for name, _ in pruned.named_parameters() if "layer.1.attention.self" in name]
    assert names == []


def test_pruning_twice_names_heads_by_their_original_index():
    once = ShrpBertForSequenceClassification.from_stock(tiny_bert(dtype=torch.float64))
    twice = copy.deepcopy(once)
    once.prune_heads({0: [0, 1], 2: [3]})
    twice.prune_heads({0: [1]})
    twice.prune_heads(KeepPlan(((2, 3), ALL, (0, 1, 2)), 4))
    assert once.config.kept_heads == twice.config.kept_heads == [[2, 3], [0, 1, 2, 3], [0, 1, 2]]
    assert same_state(once, twice)


def test_both_forms_meet_in_one_model():
    model = tiny_routed([2], dtype=torch.float64)
    model.prune_heads({0: [1]})  # ordinary layers first; the router stays
    assert model.config.routed
    assert len(model(**batch()).router_logits) == 1
    model.prune_heads(KeepPlan(((0, 2), ALL, (1, 3)), 4))
    assert (model.config.routed, model.config.kept_heads) == (False, [[0, 2], [0, 1, 2, 3], [1, 3]])
    model.prune_heads(KeepPlan(((0, 2), ALL, (3,)), 4))  # and again, once it is static
    assert model.layers[2].attention.self.query.weight.shape == (8, 32)


def test_keeping_everything_only_drops_the_router():
    model = tiny_routed(2, experts_per_sequence=4, dtype=torch.float64)
    routed = logits_of(model)
    model.prune_heads(KeepPlan.full(3, 4))
    assert (model.config.kept_heads, model.config.routed) == (None, False)
    torch.testing.assert_close(logits_of(model), routed, **EXACT)


# --- what is refused: the model stays as it was ---


def routed_and_cut():
    model = tiny_routed([2])
    model.prune_heads({0: [1]})
    return model


def pending():
    model = to_shrp(tiny_bert())
    model.convert_layers_([2], pending=True)
    return model


@pytest.mark.parametrize(
    ("build", "call", "message"),
    [
        pytest.param(
            routed_and_cut,
            lambda m: m.prune_heads(KeepPlan((ALL, ALL, (1,)), 4)),
            "`plan` keeps heads [1] of layer 0, which are gone; left are [0, 2, 3].",
            id="keeps a head that is gone",
        ),
        pytest.param(
            routed_and_cut,
            lambda m: m.prune_heads({0: [1, 2]}),
            "`plan` removes heads [1] of layer 0, which are gone; left are [0, 2, 3].",
            id="removes a head that is gone",
        ),
        pytest.param(
            routed_and_cut,
            lambda m: m.prune_heads({0: [4]}),
            "`plan` removes heads [4] of layer 0, which are gone; left are [0, 2, 3].",
            id="removes a head that never was",
        ),
        pytest.param(
            routed_and_cut,
            lambda m: m.prune_heads({0: [2], 3: [0]}),
            "`plan` names layer 3, but the model's layers are 0 to 2.",
            id="layer that is not there",
        ),
        pytest.param(
            routed_and_cut,
            lambda m: m.prune_heads({-1: [0]}),
            "`plan` names layer -1, but the model's layers are 0 to 2.",
            id="negative layer",
        ),
        pytest.param(
            routed_and_cut,
            lambda m: m.prune_heads({"0": [2]}),
            "`plan` names layer '0', but the model's layers are 0 to 2.",
            id="layer as text",
        ),
        pytest.param(
            routed_and_cut,
            lambda m: m.prune_heads({0: [2], 2: [0]}),
            "`plan` removes heads of layer 2, which is an expert layer: name the experts that stay in a KeepPlan.",
            id="v4 form on an expert layer",
        ),
        pytest.param(
            routed_and_cut,
            lambda m: m.prune_heads(KeepPlan(((0,), ALL, ()), 4)),
            "`plan` keeps 0 experts of expert layer 2: it needs at least one.",
            id="no expert",
        ),
        pytest.param(
            routed_and_cut,
            lambda m: m.prune_heads(KeepPlan((ALL, ALL), 4)),
            "`plan` is for 2 layers of 4 heads, but this model has 3 layers of 4 heads.",
            id="plan of another depth",
        ),
        pytest.param(
            routed_and_cut,
            lambda m: m.prune_heads(KeepPlan(((0,), (0,), (0,)), 12)),
            "`plan` is for 3 layers of 12 heads, but this model has 3 layers of 4 heads.",
            id="plan of another width",
        ),
        pytest.param(
            routed_and_cut,
            lambda m: m.prune_heads([[0], [0], [0]]),
            "`plan` must be a KeepPlan or a dict {layer: [heads to remove]}, got list.",
            id="no plan",
        ),
        pytest.param(
            pending,
            lambda m: m.prune_heads({0: [1]}),
            "Layers [2] are still pending: finish the training, or call `finish_conversion_()`, before pruning.",
            id="pruning while pending",
        ),
        pytest.param(
            pending,
            lambda m: m.finish_conversion_(),
            "Layer 2 is still to be converted: call `activate_layer_(2)`, or train to the end.",
            id="finishing too early",
        ),
        pytest.param(
            pending, lambda m: m.activate_layer_(1), "Layer 1 is not pending; pending are [2].", id="activating another"
        ),
        pytest.param(
            pending,
            lambda m: m.convert_layers_([1, 2]),
            "`expert_layers` names [2], which are expert layers already: leave them out.",
            id="converting twice",
        ),
        pytest.param(
            routed_and_cut,
            lambda m: m.convert_layers_([1]),
            "`expert_layers=[1]` cannot be converted: this model is already pruned, and a warm start needs all heads. "
            "Convert the unpruned checkpoint.",
            id="converting what is cut",
        ),
        pytest.param(
            static_model,
            lambda m: m.convert_layers_([0]),
            "`expert_layers=[0]` cannot be converted: this model is already pruned, and a warm start needs all heads. "
            "Convert the unpruned checkpoint.",
            id="converting what is static",
        ),
        *(
            pytest.param(
                pending,
                lambda m, n=n: m.convert_layers_(n),
                f"`expert_layers` must be between 1 and 3 layers, got {n}.",
                id=f"converting {n}",
            )
            for n in (0, 4, -1)
        ),
        pytest.param(
            pending,
            lambda m: m.convert_layers_([1, 3]),
            "`expert_layers` names layer 3, but the model's layers are 0 to 2.",
            id="converting a layer that is not there",
        ),
        pytest.param(
            pending,
            lambda m: m.convert_layers_([]),
            "`expert_layers` must name at least one layer, and none twice, got [].",
            id="converting nothing",
        ),
        pytest.param(
            pending,
            lambda m: m.convert_layers_([1, 1]),
            "`expert_layers` must name at least one layer, and none twice, got [1, 1].",
            id="converting one twice",
        ),
        pytest.param(
            pending,
            lambda m: m.convert_layers_(["2"]),
            "`expert_layers` must be a number of layers or a list of their indices, got ['2'].",
            id="a name",
        ),
        pytest.param(
            routed_and_cut,
            lambda m: m(torch.ones(2, 5, dtype=torch.long), attention_mask=torch.ones(2, 1, 5, 5)),
            "A routed model needs an `attention_mask` of shape (batch, length), got (2, 1, 5, 5).",
            id="mask of another shape",
        ),
        pytest.param(
            routed_and_cut, lambda m: m.bert(), "You must specify exactly one of input_ids or inputs_embeds", id="no input"
        ),
    ],
)
def test_bad_input_is_refused_and_the_model_stays_as_it_was(build, call, message):
    model = build()
    before, config = copy.deepcopy(model), model.config.to_dict()
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call(model)
    assert model.config.to_dict() == config
    assert same_state(model, before)
    assert torch.equal(logits_of(model), logits_of(before))
