"""The models: equal to stock BERT, routed equal to static, pruned equal to masked, and what they refuse."""

import copy
import re

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForNextSentencePrediction,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
)

import shrp_hf
from shrp_hf import (
    KeepPlan,
    ShrpBertConfig,
    ShrpBertForMaskedLM,
    ShrpBertForMultipleChoice,
    ShrpBertForQuestionAnswering,
    ShrpBertForSequenceClassification,
    ShrpBertForTokenClassification,
    ShrpBertModel,
)
from shrp_hf.models.expert_layer import load_balancing_loss
from shrp_hf.surgery import prune_heads, to_shrp
from shrp_hf.usage import plan_by_usage, usage_table
from tests.tiny import NO_DROPOUT, SIZES, batch, force_experts_, same_state, tiny_bert, tiny_routed

ALL = (0, 1, 2, 3)
EXACT = {"rtol": 0, "atol": 1e-10}
HEADS = [
    pytest.param(BertModel, ShrpBertModel, id="base"),
    pytest.param(BertForSequenceClassification, ShrpBertForSequenceClassification, id="sequence"),
    pytest.param(BertForTokenClassification, ShrpBertForTokenClassification, id="token"),
    pytest.param(BertForQuestionAnswering, ShrpBertForQuestionAnswering, id="question"),
    pytest.param(BertForMaskedLM, ShrpBertForMaskedLM, id="masked-lm"),
    pytest.param(BertForMultipleChoice, ShrpBertForMultipleChoice, id="choice"),
]


def inputs_for(model, padding="right", **options):
    """A batch with labels in the form that this task head wants."""
    inputs = batch(padding, **options)
    size, length = inputs["input_ids"].shape
    name = type(model).__name__
    if "TokenClassification" in name:
        return inputs | {"labels": inputs["input_ids"] % 3}
    if "MaskedLM" in name:
        return inputs | {"labels": inputs["input_ids"]}
    if "QuestionAnswering" in name:
        return inputs | {"start_positions": torch.arange(size), "end_positions": torch.arange(size) + 1}
    if "MultipleChoice" in name:
        pairs = {key: torch.stack([value, value.flip(0)], dim=1) for key, value in inputs.items()}
        return pairs | {"labels": torch.arange(size) % 2}
    return inputs | ({"labels": torch.arange(size) % 3} if "Sequence" in name else {})


def tensors_of(output):
    names = ("loss", "last_hidden_state", "pooler_output", "logits", "start_logits", "end_logits")
    tensors = {name: output[name] for name in names if output.get(name) is not None}
    for name in ("hidden_states", "attentions"):
        tensors |= {f"{name}[{i}]": tensor for i, tensor in enumerate(output.get(name) or ())}
    return tensors


def assert_same_outputs(ours, theirs, bitwise=True):
    ours, theirs = tensors_of(ours), tensors_of(theirs)
    assert ours.keys() == theirs.keys()
    assert ours
    for name in ours:
        if bitwise:
            assert torch.equal(ours[name], theirs[name]), name
        else:
            torch.testing.assert_close(ours[name], theirs[name], **EXACT)


def logits_of(model, padding="right"):
    with torch.no_grad():
        return model(**batch(padding)).logits


def static_model(plan=(ALL, (2,), (0, 3)), **fields):
    model = tiny_routed(2, **fields)
    model.prune_heads(KeepPlan(plan, 4))
    return model


# --- no expert layer ---


@pytest.mark.parametrize("padding", [None, "right", "left"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(("stock_class", "shrp_class"), HEADS)
def test_without_expert_layers_it_is_bert(stock_class, shrp_class, attention, padding):
    stock = tiny_bert(stock_class, attn_implementation=attention)
    ours = shrp_class.from_stock(stock)
    assert type(ours) is shrp_class
    inputs = inputs_for(stock, padding)
    recorded = {"output_hidden_states": True, "output_attentions": attention == "eager"}
    with torch.no_grad():
        assert_same_outputs(ours(**inputs, **recorded), stock(**inputs, **recorded))


@pytest.mark.parametrize(("stock_class", "shrp_class"), HEADS)
def test_without_expert_layers_it_trains_as_bert(stock_class, shrp_class):
    stock = tiny_bert(stock_class).train()
    ours = shrp_class.from_stock(copy.deepcopy(stock)).train()
    gradients = []
    for model in (stock, ours):
        torch.manual_seed(3)  # dropout
        output = model(**inputs_for(model))
        output[0].sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


@pytest.mark.parametrize("kept", [None, [[0, 1, 2, 3], [], [2]]], ids=["whole", "cut"])
def test_pooler_can_be_left_out(kept):
    model = ShrpBertModel(ShrpBertConfig(**SIZES, kept_heads=kept), add_pooling_layer=False).eval()
    output = model(**batch())
    assert output.pooler_output is None
    assert output.last_hidden_state.shape == (5, 9, 32)
    assert not [name for name, _ in model.named_parameters() if "pooler" in name]


def test_masked_lm_stays_tied():
    model = ShrpBertForMaskedLM.from_stock(tiny_bert(BertForMaskedLM))
    model.convert_layers_(2)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    model.resize_token_embeddings(105)
    assert model(**batch()).logits.shape[-1] == 105


def test_positions_token_types_and_embeddings_reach_the_model():
    stock = tiny_bert(BertModel)
    ours, ids = ShrpBertModel.from_stock(stock), batch(None)["input_ids"]
    inputs = {"token_type_ids": ids % 2, "position_ids": torch.arange(9).flip(0)[None]}
    with torch.no_grad():
        assert torch.equal(ours(ids, **inputs)[0], stock(ids, **inputs)[0])
        embedded = stock.get_input_embeddings()(ids)
        assert torch.equal(ours(inputs_embeds=embedded, **inputs)[0], ours(ids, **inputs)[0])
        assert not torch.equal(ours(ids, **inputs)[0], ours(ids)[0])


# --- sizes ---


@pytest.mark.parametrize(("converted", "expected"), [(11, 9_868_608), (6, 44_312_448), (0, 85_645_056)])
def test_parameters_of_bert_base(converted, expected):
    """Encoder and pooler, one expert kept in each converted layer (papers.md, section 1)."""
    kept = [list(range(12))] * (12 - converted) + [[5]] * converted
    fields = {"expert_layers": list(range(12 - converted, 12)), "routed": False, "kept_heads": kept} if converted else {}
    with torch.device("meta"):
        model = ShrpBertModel(ShrpBertConfig(**fields))
    assert sum(p.numel() for part in (model.encoder, model.pooler) for p in part.parameters()) == expected


# --- routed and static ---


@pytest.mark.parametrize("padding", [None, "right", "left"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("experts", [(2,), (3, 0), (1, 2, 3)], ids=str)
def test_routed_with_forced_experts_is_static_with_them_kept(experts, attention, padding):
    model = tiny_routed(
        2, experts_per_sequence=len(experts), dtype=torch.float64, attn_implementation=attention
    )
    for layer in (1, 2):
        force_experts_(model, layer, experts)
    routed = logits_of(model, padding)
    static = prune_heads(model, KeepPlan((ALL, experts, experts), 4))
    torch.testing.assert_close(logits_of(static, padding), routed, **EXACT)
    other = prune_heads(model, KeepPlan((ALL, experts, (*experts[1:], next(e for e in ALL if e not in experts))), 4))
    assert (logits_of(other, padding) - routed).abs().max() > 1e-4


@pytest.mark.parametrize(("stock_class", "shrp_class"), HEADS)
def test_every_task_head_routed_is_static(stock_class, shrp_class):
    model = tiny_routed([0, 2], head=shrp_class, dtype=torch.float64)
    for layer in (0, 2):
        force_experts_(model, layer, [1])
    static = prune_heads(model, KeepPlan(((1,), ALL, (1,)), 4))
    with torch.no_grad():
        inputs = inputs_for(model)
        routed, cut = model(**inputs), static(**inputs)
    assert len(routed.router_logits) == 2
    assert "router_logits" not in cut
    assert_same_outputs(routed, cut, bitwise=False)


def test_dropping_the_router_changes_nothing_where_one_expert_is_used():
    model = tiny_routed(2, dtype=torch.float64, **NO_DROPOUT)
    force_experts_(model, 1, [3])
    force_experts_(model, 2, [0])
    model.train()(**batch())
    model.eval()
    before = logits_of(model)
    plan = plan_by_usage(model, model.usage())
    assert plan.kept == (ALL, (3,), (0,))
    model.prune_heads(plan)
    torch.testing.assert_close(logits_of(model), before, **EXACT)


def test_routing_is_a_matter_of_the_sequence_alone():
    model = tiny_routed(2, dtype=torch.float64)
    inputs, together = batch(), logits_of(tiny_routed(2, dtype=torch.float64))
    with torch.no_grad():
        alone = [model(**{name: value[i : i + 1] for name, value in inputs.items()}).logits for i in range(5)]
    torch.testing.assert_close(torch.cat(alone), together, **EXACT)


def test_nothing_unused_is_left_after_pruning():
    model = static_model(**NO_DROPOUT).train()
    names = [name for name in model.state_dict() if re.search(r"layer\.[12]\.", name)]
    assert {re.sub(r".*layer\.\d\.", "", name).rpartition(".")[0] for name in names} == {
        "attention.self.query",
        "attention.self.key",
        "attention.self.value",
        "expander.dense",
        "expander.LayerNorm",
    }
    assert model.usage() == {}
    model(**inputs_for(model)).loss.backward()
    bias_of_keys = {f"bert.encoder.layer.{i}.attention.self.key.bias" for i in range(3)}  # softmax does not see it
    idle = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0}
    assert idle <= bias_of_keys


def test_attention_maps_are_those_of_the_experts():
    routed = tiny_routed(2, attn_implementation="eager")
    maps = routed(**batch(), output_attentions=True, output_hidden_states=True)
    assert [tuple(a.shape) for a in maps.attentions] == [(5, 4, 9, 9), (5, 1, 9, 9), (5, 1, 9, 9)]
    assert len(maps.hidden_states) == 4
    static = prune_heads(routed, KeepPlan((ALL, (2,), (0, 3)), 4))
    maps = static(**batch(), output_attentions=True)
    assert [a.shape[1] for a in maps.attentions] == [4, 1, 2]
    torch.testing.assert_close(maps.attentions[2].sum(dim=-1), torch.ones(5, 2, 9))


# --- losses and usage ---


@pytest.mark.parametrize(("stock_class", "shrp_class"), HEADS[1:])
def test_losses_are_separate_fields(stock_class, shrp_class):
    model = tiny_routed(2, head=shrp_class, **NO_DROPOUT)
    model.config.router_aux_loss_coef = 0.25
    inputs = inputs_for(model)
    training, evaluation = model.train()(**inputs), model.eval()(**inputs)
    assert torch.equal(training.task_loss, evaluation.loss)
    assert torch.equal(evaluation.task_loss, evaluation.loss)
    torch.testing.assert_close(training.loss, training.task_loss + 0.25 * training.balance_loss)
    probabilities = torch.stack([logits.softmax(dim=-1).mean(dim=0) for logits in training.router_logits])
    torch.testing.assert_close(training.balance_loss, load_balancing_loss(probabilities))
    torch.testing.assert_close(evaluation.balance_loss, training.balance_loss)
    assert training.balance_loss > 1e-4


def test_without_labels_the_balance_loss_is_still_there():
    output = tiny_routed(2)(**batch())
    assert output.loss is None
    assert output.task_loss is None
    assert output.balance_loss > 0


def test_tuple_holds_what_the_output_holds():
    model = tiny_routed(2)
    output = model(**inputs_for(model))
    as_tuple = model(**inputs_for(model), return_dict=False)
    assert len(as_tuple) == len(output.to_tuple())
    assert torch.equal(as_tuple[0], output.loss)


@pytest.mark.parametrize("top", [1, 2])
def test_usage_counts_each_sequence_once(top):
    model = tiny_routed(2, experts_per_sequence=top).train()
    expected = {1: [0] * 4, 2: [0] * 4}
    for seed in (1, 2):
        output = model(**batch(size=7, seed=seed))
        output.balance_loss.backward()
        for layer, logits in zip((1, 2), output.router_logits, strict=True):
            for expert in logits.topk(top).indices.flatten().tolist():
                expected[layer][expert] += 1
    assert model.usage() == expected
    assert sum(expected[1]) == 14 * top
    model.eval()(**batch())
    with torch.no_grad():
        model.train()(**batch())
    assert model.usage() == expected  # only training counts
    assert model.state_dict()["bert.encoder.layer.1.router.usage"].dtype == torch.int64
    model.reset_usage_()
    assert model.usage() == {1: [0] * 4, 2: [0] * 4}


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`")
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_gradient_checkpointing_changes_neither_usage_nor_gradients(reentrant):
    plain = tiny_routed(2, **NO_DROPOUT).train()
    checkpointed = copy.deepcopy(plain)
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    for model in (plain, checkpointed):
        model(**inputs_for(model)).loss.backward()
    assert checkpointed.layers[1].gradient_checkpointing
    assert checkpointed.usage() == plain.usage()
    assert sum(plain.usage()[1]) == 5
    ours, theirs = dict(checkpointed.named_parameters()), dict(plain.named_parameters())
    assert all(torch.equal(ours[n].grad, theirs[n].grad) for n in theirs if theirs[n].grad is not None)
    assert theirs["bert.encoder.layer.1.router.weight"].grad.abs().max() > 0


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`")
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_checkpointing_that_cuts_the_gradient_is_refused():
    model = tiny_routed([0, 1, 2]).train()
    model.bert.embeddings.requires_grad_(False)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    message = (
        "The routers get no gradient: reentrant gradient checkpointing cuts it. Set "
        '`gradient_checkpointing_kwargs={"use_reentrant": False}`.'
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        model(inputs_embeds=torch.randn(5, 9, 32))


def test_balance_loss_alone_spreads_one_middle_layer_evenly():
    model = tiny_routed([1], **NO_DROPOUT).train()
    router, steps = model.layers[1].router, 100
    with torch.no_grad():
        router.bias[2] = 3.0  # it starts far from uniform
    optimizer = torch.optim.AdamW([router.weight, router.bias], lr=0.03)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, steps)

    def usage_of_unseen():
        with torch.no_grad():
            output = model(**batch(size=512, length=6, seed=99))
        return output.router_logits[0].argmax(dim=-1).bincount(minlength=4) / 512

    assert usage_of_unseen()[2] > 0.9
    for step in range(steps):
        optimizer.zero_grad()
        model(**batch(size=64, length=6, seed=100 + step)).balance_loss.backward()
        optimizer.step()
        decay.step()
    share = usage_of_unseen()
    assert torch.special.entr(share).sum() / torch.tensor(4.0).log() > 0.95, share


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


# --- usage plans ---

COUNTS = {1: [5, 9, 9, 0], 2: [90, 2, 5, 3]}


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        pytest.param({}, (ALL, (1,), (0,)), id="one a layer"),
        pytest.param({"keep": 2}, (ALL, (1, 2), (0, 2)), id="two a layer"),
        pytest.param({"keep": 4}, (ALL, ALL, ALL), id="all"),
        pytest.param({"keep": 2, "scope": "model"}, (ALL, (0, 1, 2), (0,)), id="over the model"),
    ],
)
def test_plan_keeps_what_is_used_most(options, kept):
    assert plan_by_usage(tiny_routed(2), COUNTS, **options) == KeepPlan(kept, 4)


@pytest.mark.parametrize(
    ("counts", "options", "message"),
    [
        pytest.param(COUNTS, {"keep": 0}, "`keep` must be between 1 and 4 experts, got 0.", id="none"),
        pytest.param(COUNTS, {"keep": 5}, "`keep` must be between 1 and 4 experts, got 5.", id="too many"),
        pytest.param(COUNTS, {"keep": 0.5}, "`keep` must be between 1 and 4 experts, got 0.5.", id="a share"),
        pytest.param(COUNTS, {"keep": True}, "`keep` must be between 1 and 4 experts, got True.", id="a bool"),
        pytest.param(
            COUNTS, {"scope": "global"}, "`scope` must be \"layer\" or \"model\", got 'global'.", id="unknown scope"
        ),
        pytest.param(
            {1: [1, 2, 3, 4], 2: [0, 0, 0, 0]},
            {},
            "No usage is recorded for expert layer 2: train with ShrpTrainer, or count on a dataset with "
            "`trainer.usage_plan(dataset)`.",
            id="no usage",
        ),
        pytest.param(
            {2: [1, 2, 3, 4]},
            {},
            "No usage is recorded for expert layer 1: train with ShrpTrainer, or count on a dataset with "
            "`trainer.usage_plan(dataset)`.",
            id="layer not counted",
        ),
    ],
)
def test_plan_by_usage_refuses(counts, options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        plan_by_usage(tiny_routed(2), counts, **options)


@pytest.mark.parametrize("build", [static_model, lambda: to_shrp(tiny_bert())], ids=["static", "dense"])
def test_plan_by_usage_needs_a_router(build):
    message = "The model has no routed expert layers: convert some with `from_pretrained(..., expert_layers=n)`."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        plan_by_usage(build(), COUNTS)


def test_usage_prints_as_a_table():
    assert usage_table({2: [90, 2, 5, 3], 1: [0, 0, 0, 0]}).splitlines() == [
        "layer  sequences  e0    e1    e2    e3   ",
        "    1          0      -     -     -     -",
        "    2        100   90.0   2.0   5.0   3.0",
    ]
    assert usage_table({}) == "no routed expert layers"


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


def test_model_of_another_family_is_refused():
    other = DistilBertModel(DistilBertConfig(dim=8, n_layers=1, n_heads=2, hidden_dim=8, vocab_size=9))
    message = "`DistilBertModel` is of the family `distilbert`, which ShrpBertModel does not extend."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        ShrpBertModel.from_stock(other)


def test_task_head_without_a_shrp_class_is_refused():
    with pytest.raises(ValueError, match=r"^`BertForNextSentencePrediction` has no Shrp class; supported are .*BertModel"):
        to_shrp(BertForNextSentencePrediction(BertConfig(**SIZES)))


def test_decoder_is_refused():
    message = "`is_decoder=True` is not supported: shrp_hf makes encoders smaller. Set it to False."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        to_shrp(BertModel(BertConfig(**SIZES, is_decoder=True)))


# --- what others do with the models ---


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_static_model_compiles_whole(backend):
    model = static_model(dtype=torch.float64)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        torch.testing.assert_close(compiled(**batch()).logits, logits_of(model), **EXACT)


@pytest.mark.parametrize("targets", [["query", "value"], ["query", "key", "value", "dense"]], ids=str)
def test_lora_refuses_the_routed_experts_and_trains_the_static_ones(targets):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(task_type="SEQ_CLS", target_modules=targets, r=2)
    with pytest.raises(ValueError, match=r"^Target module ExpertLinear\(\) is not supported"):
        get_peft_model(tiny_routed(2), config)
    model = get_peft_model(static_model(), config).train()
    model(**inputs_for(static_model())).loss.backward()
    adapters = {name: p.grad for name, p in model.named_parameters() if "lora_B" in name}
    assert any("layer.2.attention.self.query" in name for name in adapters)
    assert all(grad.abs().max() > 0 for name, grad in adapters.items() if ".key." not in name)


def test_public_names_are_those_of_the_heads():
    assert {param.values[1].__name__ for param in HEADS} <= set(shrp_hf.__all__)
