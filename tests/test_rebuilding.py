"""What a rebuild or a cut would lose is refused by name; what is right all the same is let through, and equal."""

import copy
import re
import types

import pytest
import torch
import transformers
from accelerate.hooks import ModelHook, add_hook_to_module
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm
from transformers import BertForSequenceClassification

from shrp_hf import (
    Budget,
    EntropySelector,
    HisSelector,
    KeepPlan,
    MagnitudeSelector,
    ShrpBertForSequenceClassification,
    masked_heads,
    prune_heads,
    to_shrp,
    to_stock,
)
from shrp_hf.export import export_onnx
from tests.tiny import batch, randomize_, same_state, tiny_bert

LORA = LoraConfig(r=2, target_modules=["query", "value"], init_lora_weights=False)
PLAN = KeepPlan(((0, 2), (0, 1, 2, 3), (1,)), 4)
QUERY = "bert.encoder.layer.0.attention.self.query"


def query(model):
    return model.get_submodule(QUERY)


def doubled(self, *args, **kwargs):
    return 2 * type(self).forward(self, *args, **kwargs)


def own_forward(model):
    module = model.get_submodule("bert.encoder.layer.1.output.dense")
    module.forward = types.MethodType(doubled, module)


def forward_of_the_model(model):
    model.forward = types.MethodType(lambda self, **kwargs: type(self).forward(self, **kwargs), model)


def subclass(model):
    model.__class__ = type("BertForSequenceClassification", (BertForSequenceClassification,), {"__module__": "mine"})


def activation(model):
    model.bert.encoder.layer[1].intermediate.intermediate_act_fn = nn.ReLU()


def dropout(model):
    model.bert.encoder.layer[2].output.dropout.p = 0.0


def epsilon(model):
    model.bert.embeddings.LayerNorm.eps = 1e-3


def lora(model):
    inject_adapter_in_model(LORA, model)


def masks(model):
    prune.l1_unstructured(query(model), "weight", amount=0.5)


def weight_norm(model):
    parametrizations.weight_norm(query(model))


def weight_norm_of_old(model):
    torch.nn.utils.weight_norm(query(model))


def spectral(model):
    spectral_norm(query(model))


def quantised(model):
    torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, inplace=True)


def added(model):
    model.bert.encoder.layer[0].output.adapter = nn.Linear(32, 32)


def wider(model):
    model.classifier = nn.Linear(32, 5)


def identity(model):
    model.dropout = nn.Identity()


ALTERATIONS = {
    own_forward: "`bert.encoder.layer.1.output.dense` has a `forward` of its own, set on the instance: `del module",
    forward_of_the_model: "the model has a `forward` of its own",
    subclass: "`model` is a mine.BertForSequenceClassification, no class of Transformers: the code of",
    activation: "`bert.encoder.layer.1.intermediate.intermediate_act_fn` is ReLU instead of GELUActivation. Undo it, or",
    dropout: "`bert.encoder.layer.2.output.dropout` has `p` 0.0 instead of 0.1. Undo it, or say it in the config",
    epsilon: "`bert.embeddings.LayerNorm` has `eps` 0.001 instead of 1e-12",
    lora: f"`{QUERY}` is adapted in place (PEFT): merge the adapter first, by `PeftModel.from_pretrained(base, adapter).merge",
    masks: f'`{QUERY}` has no weight of its own (`weight_orig`): `torch.nn.utils.prune.remove(module, "weight")` first',
    weight_norm: f'`{QUERY}` is parametrized: `torch.nn.utils.parametrize.remove_parametrizations(module, "weight")` first',
    weight_norm_of_old: f"`{QUERY}` has no weight of its own (`weight_g`): `torch.nn.utils.remove_weight_norm(module",
    spectral: f'`{QUERY}` has no weight of its own (`weight_orig`): `torch.nn.utils.remove_spectral_norm(module, "weight")`',
    quantised: f"`{QUERY}` is quantised: prune the model as it was before, and quantise the result",
    added: "`bert.encoder.layer.0.output.adapter` (Linear) was added",
    wider: "`classifier` has `out_features` 5 instead of 3",
    identity: "`dropout` is Identity instead of Dropout",
}


@pytest.mark.parametrize(
    "act",
    [to_shrp, lambda m: prune_heads(m, PLAN), ShrpBertForSequenceClassification.from_stock],
    ids=["to_shrp", "prune_heads", "from_stock"],
)
@pytest.mark.parametrize(("alter", "message"), ALTERATIONS.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_what_a_rebuild_would_lose_is_refused_by_name(alter, message, act):
    model = tiny_bert()
    alter(model)
    with pytest.raises(ValueError, match=re.escape(message)):
        act(model)


@pytest.mark.parametrize("alter", [own_forward, activation, dropout, lora, masks, added], ids=lambda value: value.__name__)
def test_full_size_model_is_not_rebuilt_from_an_altered_one(alter):
    model = prune_heads(tiny_bert(), KeepPlan(((0, 1, 2, 3), (0, 2), (1,)), 4))
    alter(model)
    with pytest.raises(ValueError, match=re.escape(ALTERATIONS[alter].partition(". ")[0])):
        to_stock(model)


def hooked(model):
    model.bert.register_forward_hook(lambda *args: None)


def checkpointed(model):
    model.gradient_checkpointing_enable()


def on_a_device_of_accelerate(model):
    add_hook_to_module(model, ModelHook())


def under_autocast(model):
    """As accelerate leaves a model that was trained in bfloat16."""
    model._original_forward = model.forward
    model.forward = types.MethodType(lambda self, *args, **kwargs: self._original_forward(*args, **kwargs), model)


def without_pooler(model):
    model.bert.pooler = None


def frozen_and_in_training(model):
    model.train().requires_grad_(False)


@pytest.mark.parametrize(
    "alter",
    [hooked, checkpointed, on_a_device_of_accelerate, under_autocast, frozen_and_in_training],
    ids=lambda value: value.__name__,
)
def test_how_a_model_is_used_does_not_matter(alter):
    model = tiny_bert()
    alter(model)
    assert same_state(to_shrp(model), model)


def test_a_base_model_may_have_lost_its_pooler():
    model = tiny_bert(transformers.BertModel)
    model.pooler = None
    assert to_shrp(model).pooler is None


@pytest.mark.parametrize("alter", [own_forward, activation, epsilon, added], ids=lambda value: value.__name__)
def test_altered_model_is_masked_as_it_is(alter):
    model = tiny_bert(dtype=torch.float64)
    alter(model)
    model.double()
    with masked_heads(model, PLAN):
        masked = logits_of(model)
    with torch.no_grad():  # W_O without the columns of heads that go
        for layer, heads in zip(model.bert.encoder.layer, PLAN.kept, strict=True):
            gone = [head * 8 + i for head in range(4) if head not in heads for i in range(8)]
            layer.attention.output.dense.weight[:, gone] = 0
    torch.testing.assert_close(masked, logits_of(model), rtol=0, atol=1e-10)


# --- wrapped projections ---


def adapted():
    """A model with LoRA in place, and the same with LoRA merged, in float64."""
    torch.manual_seed(3)
    wrapped = get_peft_model(tiny_bert(dtype=torch.float64), LORA).double().eval()
    merged = copy.deepcopy(wrapped).merge_and_unload()
    return wrapped.base_model.model, merged


def logits_of(model):
    with torch.no_grad():
        return model(**batch()).logits


def labelled():
    return [batch() | {"labels": torch.tensor([0, 1, 2, 0, 1])}]


def test_mask_of_an_adapted_model_is_that_of_the_merged_one():
    model, merged = adapted()
    with masked_heads(model, PLAN), masked_heads(merged, PLAN):
        torch.testing.assert_close(logits_of(model), logits_of(merged), rtol=0, atol=1e-10)
    torch.testing.assert_close(logits_of(prune_heads(merged, PLAN)), masked_logits(merged), rtol=0, atol=1e-10)


def masked_logits(model):
    with masked_heads(model, PLAN):
        return logits_of(model)


@pytest.mark.parametrize("selector", [HisSelector, EntropySelector])
def test_scores_of_an_adapted_model_are_those_of_the_merged_one(selector):
    found = []
    for model in adapted():
        chooser = selector(budget=Budget.heads(6))
        found.append((chooser.select(model, labelled()), chooser.scores))
    assert found[0][0] == found[1][0]
    torch.testing.assert_close(found[0][1], found[1][1], rtol=0, atol=1e-10)


@pytest.mark.parametrize("alter", [lora, masks, weight_norm], ids=lambda value: value.__name__)
def test_magnitude_of_a_wrapped_weight_is_refused(alter):
    model = tiny_bert()
    alter(model)
    message = ALTERATIONS[alter].replace(f"`{QUERY}`", "`attention.self.query` of layer 0")
    with pytest.raises(ValueError, match=re.escape(message)):
        MagnitudeSelector(budget=Budget.heads(6)).select(model)


def test_export_of_a_wrapped_model_is_refused_before_anything_is_written(tmp_path):
    model = tiny_bert()
    lora(model)
    with pytest.raises(ValueError, match=r"^`attention.self.query` of layer 0 is adapted in place \(PEFT\): merge"):
        export_onnx(model, None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("alter", [lora, masks, weight_norm, spectral], ids=lambda value: value.__name__)
@pytest.mark.parametrize(
    "act",
    [lambda m: m.prune_heads(PLAN), lambda m: prune_heads(m, {0: [1]}), lambda m: m.convert_layers_([0])],
    ids=["method", "function", "convert"],
)
def test_wrapped_projection_of_a_shrp_model_is_not_cut(alter, act):
    model = to_shrp(tiny_bert())
    alter(model)
    before, config = {name: tensor.clone() for name, tensor in model.state_dict().items()}, model.config.to_dict()
    with pytest.raises(ValueError, match=f"^`.*query`.*{re.escape(ALTERATIONS[alter].partition('` ')[2])}"):
        act(model)
    assert model.config.to_dict() == config
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_projection_of_another_class_is_not_cut():
    class Scaled(nn.Linear):
        pass

    model = to_shrp(tiny_bert())
    model.layers[0].attention.self.query = Scaled(32, 32)
    with pytest.raises(
        ValueError, match=r"^`attention.self.query` of layer 0 is a Scaled, not `nn.Linear`: replace it first.$"
    ):
        model.prune_heads({0: [1]})


def test_layers_that_lose_nothing_may_stay_wrapped():
    model = to_shrp(tiny_bert(dtype=torch.float64))
    parametrizations.weight_norm(query(model))
    randomize_(query(model))
    plan = {2: [0, 3]}
    with masked_heads(model, plan):
        masked = logits_of(model)
    torch.testing.assert_close(logits_of(prune_heads(model, plan)), masked, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "act",
    [lambda m: masked_heads(m, PLAN).__enter__(), lambda m: HisSelector(budget=Budget.heads(6)).select(m, labelled())],
    ids=["masked_heads", "selector"],
)
def test_quantised_model_is_refused(act):
    model = tiny_bert()
    quantised(model)
    with pytest.raises(ValueError, match=r"^Layer 0 is quantised: score and prune the model as it was before, then quantise"):
        act(model)
