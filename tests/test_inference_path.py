"""Serving a model: compiled, exported, or in half precision it says what eager says."""

import copy

import pytest
import torch
from transformers import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    ElectraConfig,
    ElectraForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

from shrp_hf.measuring import random_inputs
from shrp_hf.models.modeling_shrp_bert import ShrpBertForSequenceClassification
from shrp_hf.plans.keep_plan import KeepPlan
from shrp_hf.pruning import prune_heads, to_shrp
from tests.tiny import SIZES, assert_near, batch, force_experts_, randomize_, tiny_bert, tiny_routed

HALF = KeepPlan(((0, 2), (1,), (0, 1, 2, 3)), 4)
EXACT = {"rtol": 0, "atol": 1e-10}  # in float64
ZERO = KeepPlan(((0, 2), (), (0, 1, 2, 3)), 4)
VIT = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64, "image_size": 8}
STOCK = {
    "distilbert": lambda: DistilBertForSequenceClassification(
        DistilBertConfig(vocab_size=99, dim=32, n_layers=3, n_heads=4, hidden_dim=64, max_position_embeddings=40)
    ),
    "electra": lambda: ElectraForSequenceClassification(ElectraConfig(**SIZES, embedding_size=16)),
    "roberta": lambda: RobertaForSequenceClassification(RobertaConfig(**SIZES)),
    "vit": lambda: ViTForImageClassification(ViTConfig(**VIT, patch_size=4)),
}


def static(keep=1, **fields):
    kept = ((0, 1, 2, 3), tuple(range(1, 1 + keep)), tuple(range(keep)))
    return prune_heads(tiny_routed([1, 2], **fields), KeepPlan(kept, 4)).eval()


def of_family(name, plan):
    torch.manual_seed(3)
    model = STOCK[name]()
    randomize_(model)
    return prune_heads(to_shrp(model.eval()), plan)


MODELS = {
    "dense": lambda: ShrpBertForSequenceClassification.from_stock(tiny_bert()),
    "routed": lambda: tiny_routed([1, 2]),
    "routed, two experts, cls": lambda: tiny_routed([1, 2], experts_per_sequence=2, router_pooling="cls"),
    "static": static,
    "static, two experts": lambda: static(2),
    "half": lambda: prune_heads(tiny_bert(), HALF),
    "zero heads": lambda: prune_heads(tiny_bert(), ZERO),
    **{f"{name}, zero heads": lambda name=name: of_family(name, ZERO) for name in STOCK},
}


def inputs_of(model, size=5, length=9):
    if model.main_input_name == "input_ids":
        return batch(size=size, length=length)
    return {name: values.to(model.dtype) for name, values in random_inputs(model, size, 1).items()}


SUBSETS = ("dense", "static", "half")  # what is compiled of them is compiled of others too
EACH = [pytest.param(name, marks=pytest.mark.slow if name in SUBSETS else ()) for name in MODELS]


@pytest.mark.parametrize("name", EACH)
def test_compiled_without_a_graph_break_equals_eager(name):
    torch._dynamo.reset()
    model = MODELS[name]().double().eval()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    with torch.inference_mode():
        for size, length in ((5, 9), (3, 12)):
            inputs = inputs_of(model, size, length)
            torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits, **EXACT)


@pytest.mark.parametrize("name", EACH)
def test_exported_with_dynamic_batch_and_length_equals_eager(name):
    model = MODELS[name]().double().eval()
    inputs = inputs_of(model)
    names = {0: torch.export.Dim.DYNAMIC} | ({1: torch.export.Dim.DYNAMIC} if "input_ids" in inputs else {})
    with torch.no_grad():
        program = torch.export.export(model, (), inputs, dynamic_shapes=dict.fromkeys(inputs, names)).module()
        for size, length in ((5, 9), (3, 12)):
            other = inputs_of(model, size, length)
            torch.testing.assert_close(program(**other).logits, model(**other).logits, **EXACT)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["static", "routed", "zero heads"])
def test_inductor_equals_eager(name):
    torch._dynamo.reset()
    model = MODELS[name]().double().eval()
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    with torch.inference_mode():
        for size, length in ((5, 9), (3, 12)):
            inputs = inputs_of(model, size, length)
            torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits, **EXACT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", MODELS)
def test_half_precision_is_near_double(name, dtype):
    model = MODELS[name]().eval()
    for layer in model.config.expert_layers if getattr(model.config, "is_routed", False) else ():
        # Rounded hidden states may send a sequence to another expert, which is no error of the arithmetic.
        force_experts_(model, layer, range(model.config.experts_per_sequence))
    half = copy.deepcopy(model).to(dtype)
    with torch.inference_mode():
        expected = copy.deepcopy(half).double()(**inputs_of(model.double())).logits
        found = half(**inputs_of(half)).logits
    assert found.dtype == dtype
    assert_near(found, expected, dtype, roundings=32)


def test_flash_attention_is_reached_through_transformers_interface(monkeypatch):
    """No kernel is needed: whatever stands under the name in Transformers' table is called, with the layer's scaling."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    scalings = []

    def attend(module, query, key, value, mask, scaling=None, **kwargs):
        scalings.append(scaling)
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, None, scaling=scaling)

    model, inputs = static().double(), batch(None)
    with torch.inference_mode():
        expected = model(**inputs).logits
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flash_attention_2", attend)
        model.config._attn_implementation = "flash_attention_2"
        torch.testing.assert_close(model(**inputs).logits, expected, **EXACT)
    assert scalings == [8**-0.5] * 3
