"""Masks come off again, arguments stay as they were, and what cannot be cut is refused by name."""

import copy
import re

import pytest
import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from shrp_hf import KeepPlan, ShrpBertConfig, masked_heads, prune_heads, to_shrp, to_stock
from tests.foreign import FOREIGN, foreign_model, refusal
from tests.tiny import SIZES, batch, force_experts_, same_state, tiny_bert, tiny_routed

ALL = (0, 1, 2, 3)
PLAN = KeepPlan(((0, 2), (), (3,)), 4)


@torch.no_grad()
def logits_of(model: PreTrainedModel) -> torch.Tensor:
    return model(**batch()).logits


def static() -> PreTrainedModel:
    model = tiny_routed([2], dtype=torch.float64)
    model.prune_heads(KeepPlan((ALL, (0, 1, 3), (1, 2)), 4))
    return model


def hooks_of(model: PreTrainedModel) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


# --- masks ---


def test_mask_comes_off_and_leaves_nothing():
    model = tiny_bert()
    before, full = copy.deepcopy(model), logits_of(model)
    with masked_heads(model, PLAN) as inside:
        assert inside is model
        assert not torch.allclose(logits_of(model), full, atol=1e-3)
    assert torch.equal(logits_of(model), full)
    assert same_state(model, before)
    assert hooks_of(model) == 0


def test_mask_comes_off_after_an_error():
    model = tiny_bert()
    full = logits_of(model)
    with pytest.raises(RuntimeError, match="inside"), masked_heads(model, PLAN):
        raise RuntimeError("inside")
    assert torch.equal(logits_of(model), full)


def test_plan_that_keeps_everything_masks_nothing():
    model = tiny_bert()
    with masked_heads(model, KeepPlan.full(3, 4)):
        assert hooks_of(model) == 0


def test_masks_nest():
    model = tiny_bert(dtype=torch.float64)
    with masked_heads(model, {0: [1]}), masked_heads(model, {0: [3], 1: [0]}):
        nested = logits_of(model)
    with masked_heads(model, {0: [1, 3], 1: [0]}):
        torch.testing.assert_close(logits_of(model), nested, rtol=0, atol=1e-10)


def test_masked_gradient_is_that_of_the_heads_that_are_left():
    model = tiny_bert(dtype=torch.float64)
    with masked_heads(model, KeepPlan(((0, 2), ALL, ALL), 4)):
        model(**batch(), labels=torch.zeros(5, dtype=torch.long)).loss.backward()
    gradient = model.bert.encoder.layer[0].attention.self.value.weight.grad.view(4, 8, 32).abs().sum(dim=(1, 2))
    assert (gradient[[1, 3]] == 0).all()
    assert (gradient[[0, 2]] > 0).all()


def test_static_model_is_masked_beside_its_experts():
    model = static()
    plan = KeepPlan(((1,), (0, 3), (1, 2)), 4)
    with masked_heads(model, plan):
        masked = logits_of(model)
    torch.testing.assert_close(logits_of(prune_heads(model, plan)), masked, rtol=0, atol=1e-10)


def test_routed_model_is_masked_beside_its_experts():
    model = tiny_routed([2], dtype=torch.float64)
    force_experts_(model, 2, [1])
    with masked_heads(model, KeepPlan(((1,), ALL, ALL), 4)):
        masked = logits_of(model)
    torch.testing.assert_close(logits_of(prune_heads(model, KeepPlan(((1,), ALL, (1,)), 4))), masked, rtol=0, atol=1e-10)


# --- arguments stay as they were, and what they are is kept ---


@pytest.mark.parametrize("build", [tiny_bert, static], ids=["stock", "static"])
@pytest.mark.parametrize("act", [lambda m: prune_heads(m, {0: [1], 1: [3]}), to_shrp], ids=["prune_heads", "to_shrp"])
def test_model_is_left_as_it_was(build, act):
    model = build()
    before, config, modules = copy.deepcopy(model), model.config.to_dict(), list(model.modules())
    full = logits_of(model)
    assert act(model) is not model or act is to_shrp
    assert same_state(model, before)
    assert model.config.to_dict() == config
    assert list(model.modules()) == modules
    assert torch.equal(logits_of(model), full)


def test_to_stock_leaves_the_model_as_it_was_and_shares_nothing():
    model = prune_heads(tiny_bert(), PLAN)
    before = copy.deepcopy(model)
    stock = to_stock(model)
    for parameter in stock.parameters():
        parameter.data.zero_()
    assert same_state(model, before)
    assert model.config.to_dict() == before.config.to_dict()


def test_to_shrp_shares_weights_and_returns_a_shrp_model_as_it_is():
    model = tiny_bert()
    shrp = to_shrp(model)
    assert shrp.bert.embeddings.word_embeddings.weight is model.bert.embeddings.word_embeddings.weight
    assert to_shrp(shrp) is shrp


def test_to_stock_returns_a_stock_model_as_it_is():
    model = tiny_bert()
    assert to_stock(model) is model


def test_untied_words_stay_untied():
    model = tiny_bert(transformers.BertForMaskedLM)
    model.cls.predictions.decoder.weight = nn.Parameter(torch.randn(99, 32))
    for other in (prune_heads(model, {}), to_stock(to_shrp(model))):
        assert torch.equal(logits_of(other), logits_of(model))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_dtype_mode_and_frozen_weights_are_kept(dtype):
    model = tiny_bert(dtype=dtype).train()
    for parameter in model.bert.parameters():
        parameter.requires_grad_(False)
    cut = prune_heads(model, PLAN)
    for other in (cut, to_stock(cut)):
        assert {parameter.dtype for parameter in other.parameters()} == {dtype}
        assert all(module.training for module in other.modules())
        assert {name for name, p in other.named_parameters() if p.requires_grad} == {"classifier.weight", "classifier.bias"}


def test_buffers_follow_the_model_to_its_device():
    model = tiny_bert().to("meta")
    cut = prune_heads(model, PLAN)
    for other in (cut, to_stock(cut)):
        assert {tensor.device.type for tensor in (*other.parameters(), *other.buffers())} == {"meta"}


def test_field_of_transformers_4_that_version_5_ignores_cuts_nothing():
    model = tiny_bert()
    model.config.pruned_heads = {0: [1]}
    assert torch.equal(logits_of(to_shrp(model)), logits_of(model))


def test_config_of_the_stock_model_holds_nothing_of_ours():
    model = prune_heads(tiny_bert(id2label={0: "a", 1: "b", 2: "c"}), PLAN)
    stock = tiny_bert(id2label={0: "a", 1: "b", 2: "c"})
    assert to_stock(model).config.to_dict() == stock.config.to_dict()
    assert same_state(to_stock(to_shrp(stock)), stock)


# --- refused ---


@pytest.mark.parametrize(
    "act",
    [to_shrp, to_stock, lambda m: prune_heads(m, {}), lambda m: masked_heads(m, {}).__enter__()],
    ids=["to_shrp", "to_stock", "prune_heads", "masked_heads"],
)
@pytest.mark.parametrize("family", FOREIGN)
def test_foreign_family_is_refused_by_name_with_the_way_to_add_it(family, act):
    with pytest.raises(ValueError, match=f"^{re.escape(refusal(family))}$"):
        act(foreign_model(family))


@pytest.mark.parametrize("act", [to_shrp, to_stock, lambda m: prune_heads(m, {})], ids=["to_shrp", "to_stock", "prune_heads"])
def test_wrapped_model_is_refused(act):
    wrapped = nn.DataParallel(tiny_bert())
    wrapped.config = wrapped.module.config
    message = (
        "`model` must be a Transformers model, got DataParallel around one. Unwrap it first (PEFT: "
        "`model.merge_and_unload()`; DistributedDataParallel: `model.module`)."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        act(wrapped)


@pytest.mark.parametrize("act", [to_shrp, to_stock], ids=["to_shrp", "to_stock"])
def test_model_of_remote_code_is_refused(act):
    class Remote(transformers.BertModel):
        config_class = ShrpBertConfig

    message = (
        "`Remote` came with its own code (`trust_remote_code=True`): load it again after `import shrp_hf`, without that "
        "option."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        act(Remote(ShrpBertConfig(**SIZES)))


@pytest.mark.parametrize(
    ("build", "act", "message"),
    [
        pytest.param(
            tiny_bert,
            lambda m: prune_heads(m, KeepPlan.full(12, 4)),
            "`plan` is for 12 layers of 4 heads, but this model has 3 layers of 4 heads.",
            id="another depth",
        ),
        pytest.param(
            tiny_bert,
            lambda m: masked_heads(m, KeepPlan.full(3, 12)).__enter__(),
            "`plan` is for 3 layers of 12 heads, but this model has 3 layers of 4 heads.",
            id="mask of another width",
        ),
        pytest.param(
            static,
            lambda m: masked_heads(m, {1: [2]}).__enter__(),
            "`plan` removes heads [2] of layer 1, which are gone; left are [0, 1, 3].",
            id="mask of a head that is gone",
        ),
        pytest.param(
            tiny_bert,
            lambda m: masked_heads(m, [[0]]).__enter__(),
            "`plan` must be a KeepPlan or a dict {layer: [heads to remove]}, got list.",
            id="mask without a plan",
        ),
        pytest.param(
            static,
            lambda m: masked_heads(m, KeepPlan((ALL, (0,), (1,)), 4)).__enter__(),
            "`plan` drops experts of layer 2: experts cannot be masked. Keep all of [1, 2] there, or cut them with "
            "`prune_heads`.",
            id="mask of an expert",
        ),
        pytest.param(
            static,
            to_stock,
            "Layers [2] are expert layers, which no stock model has. Ship the model with its code instead: "
            "`save_pretrained(..., with_code=True)`.",
            id="experts to stock",
        ),
        pytest.param(
            lambda: prune_heads(tiny_bert(), PLAN),
            lambda m: to_stock(m, compact=True),
            "`compact=True` needs a stock config that says how wide a head is, and `shrp_bert` has none: leave it False, "
            "or ship the model with `save_pretrained(..., with_code=True)`.",
            id="compact BERT",
        ),
    ],
)
def test_refused_and_left_as_it_was(build, act, message):
    model = build()
    before, config, full, hooks = copy.deepcopy(model), model.config.to_dict(), logits_of(model), hooks_of(model)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        act(model)
    assert same_state(model, before)
    assert model.config.to_dict() == config
    assert hooks_of(model) == hooks
    assert torch.equal(logits_of(model), full)


@pytest.mark.parametrize("kept", [((0,), (1, 2), (3,)), ((), (), ())], ids=["unequal", "none"])
def test_compact_vit_needs_equal_counts(kept):
    fields = {k: v for k, v in SIZES.items() if k not in ("vocab_size", "max_position_embeddings")}
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**fields, image_size=8, patch_size=4))
    counts = [len(heads) for heads in kept]
    message = f"at least one, but they keep {counts}: leave it False, or choose with a budget per layer."
    with pytest.raises(ValueError, match=re.escape(message)):
        to_stock(prune_heads(model, KeepPlan(kept, 4)), compact=True)
