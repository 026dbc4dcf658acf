"""The models: equal to stock BERT, routed equal to static, pruned equal to masked, and what they refuse."""

import copy
import re
import threading

import pytest
import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
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
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

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
from shrp_hf.pruning import prune_heads, to_shrp
from shrp_hf.selectors.usage import plan_by_usage
from tests.tiny import NO_DROPOUT, SIZES, batch, force_experts_, tiny_bert, tiny_routed

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
    model = tiny_routed(2, experts_per_sequence=len(experts), dtype=torch.float64, attn_implementation=attention)
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


def test_threads_that_share_a_routed_model_do_not_share_their_masks():
    model, mine, other = tiny_routed(2), batch("left"), batch("right", seed=4)
    expected, others = logits_of(model, "left"), []

    def meanwhile(*_):
        handle.remove()
        thread = threading.Thread(target=lambda: others.append(model(**other).logits))
        thread.start()
        thread.join()

    handle = model.layers[0].register_forward_hook(meanwhile)
    with torch.no_grad():
        assert torch.equal(model(**mine).logits, expected)
        assert torch.equal(others[0], model(**other).logits)


# --- what others do with the models ---


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_static_model_compiles_whole(backend):
    model = static_model(dtype=torch.float64)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        torch.testing.assert_close(compiled(**batch()).logits, logits_of(model), **EXACT)


@pytest.mark.parametrize("experts", [1, 3])
@pytest.mark.parametrize("targets", [None, ["query", "key", "value", "dense"]], ids=str)
def test_lora_on_routed_experts_is_lora_on_their_weights(targets, experts):
    """d loss / d B = scale * (d loss / d W) A^T, with the W that has the adapter in it."""
    from peft import LoraConfig, get_peft_model

    def routed():
        return tiny_routed(2, dtype=torch.float64, experts_per_sequence=experts, **NO_DROPOUT)

    inputs = inputs_for(routed())
    adapted = get_peft_model(routed(), LoraConfig(task_type="SEQ_CLS", r=2, lora_dropout=0.0, target_modules=targets)).train()
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
    merged = copy.deepcopy(adapted).merge_and_unload().requires_grad_(True).train()
    assert (logits_of(merged.eval()) - logits_of(routed())).abs().max() > 1e-3
    output = adapted(**inputs)
    expected = merged.train()(**inputs)
    torch.testing.assert_close(output.logits, expected.logits, **EXACT)
    output.loss.backward()
    expected.loss.backward()
    for layer in (1, 2):
        for name in ("query", "value"):
            ours = getattr(adapted.get_base_model().layers[layer].attention.self, name)
            theirs = getattr(merged.layers[layer].attention.self, name)
            assert type(theirs).__name__ == "ExpertLinear"
            grad = ours.scaling["default"] * theirs.weight.grad @ ours.lora_A["default"].weight.T
            assert grad.abs().max() > 0
            torch.testing.assert_close(ours.lora_B["default"].weight.grad, grad, **EXACT)


@pytest.mark.parametrize("targets", [None, ["query", "value"], ["query", "key", "value", "dense"]], ids=str)
def test_lora_trains_the_static_experts(targets):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(static_model(), LoraConfig(task_type="SEQ_CLS", target_modules=targets, r=2)).train()
    model(**inputs_for(static_model())).loss.backward()
    adapters = {name: p.grad for name, p in model.named_parameters() if "lora_B" in name}
    assert any("layer.2.attention.self.query" in name for name in adapters)
    assert all(grad.abs().max() > 0 for name, grad in adapters.items() if ".key." not in name)


@pytest.mark.parametrize("build", [lambda: tiny_routed(2), lambda: to_shrp(tiny_bert())], ids=["routed", "dense"])
def test_heads_under_an_adapter_are_not_cut(build):
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(build(), LoraConfig(task_type="SEQ_CLS", r=2))
    state = {name: value.clone() for name, value in adapted.state_dict().items()}
    message = "`attention.self.query` of layer 1 is adapted in place (PEFT): merge the adapter first, by "
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        adapted.get_base_model().prune_heads(KeepPlan((ALL, (2,), (0, 3)), 4))
    assert all(torch.equal(value, adapted.state_dict()[name]) for name, value in state.items())
    merged = adapted.merge_and_unload()
    merged.prune_heads(KeepPlan((ALL, (2,), (0, 3)), 4))
    assert logits_of(merged).shape == (5, 3)


def test_attention_is_dispatched_through_transformers():
    """As flash attention is, and whatever else a user registers."""
    calls = []

    def noted(module, query, key, value, attention_mask, **kwargs):
        calls.append((module.layer_idx, module.is_causal, tuple(query.shape)))
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register("noted", noted)
    AttentionMaskInterface.register("noted", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model = tiny_routed([1])
    expected = logits_of(model)
    model.set_attn_implementation("noted")
    assert torch.equal(logits_of(model), expected)
    assert calls == [(0, False, (5, 4, 9, 8)), (1, False, (5, 1, 9, 8)), (2, False, (5, 4, 9, 8))]


def test_public_names_are_those_of_the_heads():
    assert {param.values[1].__name__ for param in HEADS} <= set(shrp_hf.__all__)
