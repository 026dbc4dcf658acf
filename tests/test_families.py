"""Every family: cut equals masked, saved equals loaded, back to stock equals cut, whatever the attention and the padding."""

import copy
import functools
import json
import re
import subprocess
import sys

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification, PreTrainedModel

import shrp_hf
from shrp_hf import KeepPlan, masked_heads, prune_heads, to_shrp, to_stock
from shrp_hf.families import FAMILIES, head_layout
from tests.tiny import SIZES, batch, randomize_, same_state

HEAD_SIZE = 8
ALL = (0, 1, 2, 3)
PLANS = {
    "some": KeepPlan(((0, 2), ALL, (1, 2, 3)), 4),
    "one": KeepPlan(((3,), (0,), ALL), 4),
    "none": KeepPlan(((), ALL, ()), 4),
}
MIXED = KeepPlan(((1, 3), (), (2,)), 4)
THIN = MIXED.with_neurons((range(20, 40), (), (7,)), 64)
EXACT = {"rtol": 0, "atol": 1e-10}
DISTILBERT_SIZES = {"n_layers": 3, "n_heads": 4, "dim": 32, "hidden_dim": 64, "vocab_size": 99, "num_labels": 3}
VIT_SIZES = {"image_size": 16, "patch_size": 4} | SIZES
OUTPUT = "encoder.layer.{}.attention.output.dense"
# Model type: prefix of the classes, fields, where layer i has its output projection.
TABLE = {
    "bert": ("Bert", SIZES, OUTPUT),
    "roberta": ("Roberta", SIZES, OUTPUT),
    "xlm-roberta": ("XLMRoberta", SIZES, OUTPUT),
    "camembert": ("Camembert", SIZES, OUTPUT),
    "electra": ("Electra", SIZES | {"embedding_size": 16}, OUTPUT),
    "distilbert": ("DistilBert", DISTILBERT_SIZES, "transformer.layer.{}.attention.out_lin"),
    "vit": ("ViT", VIT_SIZES, "layers.{}.attention.o_proj"),
}
TEXT_HEADS = ["MaskedLM", "MultipleChoice", "QuestionAnswering", "SequenceClassification", "TokenClassification"]
HEADS = {family: TEXT_HEADS for family in TABLE} | {"electra": [*TEXT_HEADS, "PreTraining"], "vit": ["ImageClassification"]}
CASES = [(family, head) for family in TABLE for head in HEADS[family]]
WITHOUT_EXPERTS = ["electra", "distilbert", "vit"]


@functools.cache
def _stock(family: str, head: str, dtype: torch.dtype) -> PreTrainedModel:
    torch.manual_seed(0)
    prefix, fields, _ = TABLE[family]
    fields = fields | ({"num_labels": 2} if head == "QuestionAnswering" else {})
    name = f"{prefix}For{head}" if head else f"{prefix}Model"
    model = getattr(transformers, name)(getattr(transformers, f"{prefix}Config")(**fields))
    randomize_(model)
    return model.to(dtype).eval()


def stock(
    family: str, head: str | None = None, dtype: torch.dtype = torch.float64, attention: str = "sdpa"
) -> PreTrainedModel:
    """A stock model of the family, by default its classifier."""
    head = ("ImageClassification" if family == "vit" else "SequenceClassification") if head is None else head
    model = copy.deepcopy(_stock(family, head, dtype))
    model.set_attn_implementation(attention)
    return model


def inputs(family: str, padding: str | None = "right", dtype: torch.dtype = torch.float64, head: str = "") -> dict:
    if family == "vit":
        return {"pixel_values": torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=dtype)}
    made = batch(padding)
    if padding is not None:  # RoBERTa counts positions from what is not padding
        pad = 1 if "bert" in family and family not in ("bert", "distilbert") else 0
        made["input_ids"] = torch.where(made["attention_mask"] == 1, made["input_ids"].clamp(min=2), pad)
    return {k: torch.stack([v, v.flip(0)], dim=1) for k, v in made.items()} if head == "MultipleChoice" else made


@torch.no_grad()
def outputs(model: PreTrainedModel, family: str, padding: str | None = "right", head: str = "") -> torch.Tensor:
    """All that the model says, in one row."""
    made = model(**inputs(family, padding, model.dtype, head))
    return torch.cat(
        [made[k].flatten() for k in ("logits", "start_logits", "last_hidden_state", "pooler_output") if k in made]
    )


def silenced(model: PreTrainedModel, family: str, plan: KeepPlan) -> PreTrainedModel:
    """The reference: a copy whose output projections have zero columns where the other heads come in."""
    model = copy.deepcopy(model)
    for layer, kept in enumerate(plan.kept):
        weight = model.base_model.get_submodule(TABLE[family][2].format(layer)).weight
        for head in set(ALL) - set(kept):
            weight.data[:, head * HEAD_SIZE : (head + 1) * HEAD_SIZE] = 0
    return model


# --- cut == masked ---


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(
    ("family", "padding"),
    [(family, padding) for family in TABLE for padding in ("left", "right", None) if family != "vit" or padding is None],
)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_cut_equals_masked(family, attention, padding, plan):
    model, plan = stock(family, attention=attention), PLANS[plan]
    expected = outputs(silenced(model, family, plan), family, padding)
    assert not torch.allclose(expected, outputs(model, family, padding), rtol=0, atol=1e-3)
    with masked_heads(model, plan):
        torch.testing.assert_close(outputs(model, family, padding), expected, **EXACT)
    cut = prune_heads(model, plan)
    torch.testing.assert_close(outputs(cut, family, padding), expected, **EXACT)
    assert cut.num_parameters() < model.num_parameters()


@pytest.mark.parametrize("family", TABLE)
def test_cut_equals_masked_in_float32(family):
    model = stock(family, dtype=torch.float32)
    cut = prune_heads(model, MIXED)
    assert cut.dtype == torch.float32
    torch.testing.assert_close(outputs(cut, family), outputs(silenced(model, family, MIXED), family), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", TABLE)
def test_cutting_in_two_steps_equals_cutting_at_once(family):
    once = prune_heads(stock(family), MIXED)
    first = prune_heads(stock(family), {0: [0], 1: [2], 2: [3]})
    with masked_heads(first, MIXED):
        torch.testing.assert_close(outputs(first, family), outputs(once, family), **EXACT)
    twice = prune_heads(first, MIXED)
    assert same_state(twice, once)
    assert twice.config.to_dict() == once.config.to_dict()
    assert head_layout(twice).kept == MIXED.kept


@pytest.mark.parametrize("family", TABLE)
def test_cut_model_trains(family):
    model = prune_heads(stock(family), MIXED).train()
    size = len(next(iter(inputs(family).values())))
    model(**inputs(family), labels=torch.zeros(size, dtype=torch.long)).loss.backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    # In a ViT layer without heads nothing reads the norm before them.
    assert without == ([f"vit.layers.1.layernorm_before.{kind}" for kind in ("weight", "bias")] if family == "vit" else [])


# --- the same classes as the stock ones, with the same outputs ---


@pytest.mark.parametrize(("family", "head"), [*CASES, *((family, "") for family in TABLE)])
def test_wrapped_equals_stock(family, head):
    model = stock(family, head)
    before = copy.deepcopy(model)
    wrapped = to_shrp(model)
    assert type(wrapped).__name__ == "Shrp" + type(model).__name__.replace("XLM", "").replace("Camembert", "Roberta")
    assert type(wrapped) is getattr(shrp_hf, type(wrapped).__name__)
    assert torch.equal(outputs(wrapped, family, head=head), outputs(model, family, head=head))
    assert torch.equal(outputs(to_stock(wrapped), family, head=head), outputs(model, family, head=head))
    assert type(to_stock(wrapped)) is type(model)
    if head == "MaskedLM":
        for each in (wrapped, prune_heads(model, MIXED), to_stock(wrapped)):
            assert each.get_output_embeddings().weight is each.get_input_embeddings().weight
    assert same_state(model, before)


@pytest.mark.parametrize("family", TABLE)
def test_auto_classes_know_the_family(family):
    wrapped = to_shrp(stock(family))
    config_class = type(wrapped.config)
    assert AutoConfig.for_model(wrapped.config.model_type).__class__ is config_class
    assert AutoModel._model_mapping[config_class] is wrapped.base_model_class
    for head in HEADS[family]:
        auto = getattr(transformers, f"AutoModelFor{head}")
        assert auto._model_mapping[config_class].__name__ == type(wrapped).__name__.split("For")[0] + f"For{head}"


def test_every_stock_family_has_its_head_map_and_its_shrp_type():
    assert set(TABLE) | {to_shrp(stock(family)).config.model_type for family in TABLE} == set(FAMILIES)


# --- files ---


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """One directory per family with its stock, its cut and its silent model, and what the cut one says."""
    root = tmp_path_factory.mktemp("families")
    for family in TABLE:
        model = stock(family)
        cut = prune_heads(model, THIN)
        model.save_pretrained(root / family / "stock")
        cut.save_pretrained(root / family / "cut", with_code=True)
        to_stock(cut).save_pretrained(root / family / "silent")
        torch.save((inputs(family), outputs(cut, family)), root / family / "said.pt")
    return root


READ_ALL = """
import json, sys, torch
{before}
from pathlib import Path
from transformers import AutoModel, AutoModelForImageClassification, AutoModelForSequenceClassification
found = {{}}
for folder in map(Path, sys.argv[1:]):
    trust = {{"trust_remote_code": True}} if {trust} and folder.name == "cut" else {{}}
    auto = AutoModelForImageClassification if folder.parent.name == "vit" else AutoModelForSequenceClassification
    model = auto.from_pretrained(folder, dtype=torch.float64, **trust)
    batch, expected = torch.load(folder.parent / "said.pt")
    with torch.no_grad():
        error = (model(**batch).logits.flatten() - expected).abs().max().item()
    base = AutoModel.from_pretrained(folder, **trust)
    key = f"{{folder.parent.name}} {{folder.name}}"
    found[key] = [type(model).__name__, type(model).__module__, type(base).__name__, error]
print(json.dumps(found))
"""


def read_all(folders, before, trust):
    code = READ_ALL.format(before=before, trust=trust)
    run = subprocess.run([sys.executable, "-c", code, *map(str, folders)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    for key, (name, module, base, error) in found.items():
        assert error <= 1e-10, key
        yield key.split()[0], key.split()[1], name, module, base


def test_saved_equals_loaded_in_one_fresh_process(written):
    for family, _, name, module, base in read_all([written / family / "cut" for family in TABLE], "import shrp_hf", False):
        shrp = to_shrp(stock(family))
        assert (name, module, base) == (type(shrp).__name__, type(shrp).__module__, shrp.base_model_class.__name__)


def test_silent_models_and_remote_code_load_without_us(written):
    folders = [written / family / "silent" for family in TABLE]
    folders += [written / family / "cut" for family in ("roberta", "electra", "distilbert", "vit")]
    for family, kind, name, module, base in read_all(folders, "sys.modules['shrp_hf'] = None", True):
        prefix = TABLE[family][0]
        if kind == "silent":
            assert (name, base) == (type(stock(family)).__name__, f"{prefix}Model")
            assert module.startswith("transformers.models.")
        else:
            assert (name.split("For")[0], base) == (f"Shrp{prefix}", f"Shrp{prefix}Model")
            assert module.startswith("transformers_modules.")


@pytest.mark.parametrize("family", TABLE)
def test_stock_checkpoint_loads_into_the_shrp_class(written, family):
    shrp_class = type(to_shrp(stock(family)))
    model, info = shrp_class.from_pretrained(written / family / "stock", dtype=torch.float64, output_loading_info=True)
    assert [info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")] == [set(), set(), set()]
    assert same_state(model, to_shrp(stock(family)))
    torch.testing.assert_close(outputs(model, family), outputs(stock(family), family), **EXACT)
    model.prune_heads(MIXED)
    assert same_state(model, prune_heads(stock(family), MIXED))


@pytest.mark.parametrize("family", ["roberta", "distilbert", "vit"])
def test_checkpoint_cut_by_transformers_4_loads(written, tmp_path, family):
    model = prune_heads(stock(family), {0: [1, 2], 2: [3]})
    model.save_pretrained(tmp_path)
    fields = json.loads((written / family / "stock" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | {"pruned_heads": {"0": [1, 2], "2": [3]}}))
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.float64)
    assert loaded.config.kept_heads == [[0, 3], [0, 1, 2, 3], [0, 1, 2]]
    torch.testing.assert_close(outputs(loaded, family), outputs(model, family), **EXACT)


@pytest.mark.parametrize(("family", "name"), [("xlm-roberta", "XLMRobertaConfig"), ("camembert", "CamembertConfig")])
def test_what_a_config_leaves_out_means_the_default_of_its_own_family(tmp_path, family, name):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family, "hidden_size": 24}))
    config, theirs = shrp_hf.ShrpRobertaConfig.from_pretrained(tmp_path), getattr(transformers, name)(hidden_size=24)
    assert config.vocab_size == theirs.vocab_size != transformers.RobertaConfig().vocab_size
    assert {k: v for k, v in config.to_dict().items() if k in theirs.to_dict() and k != "model_type"} == {
        k: v for k, v in theirs.to_dict().items() if k != "model_type"
    }
    assert (config.model_type, config.stock_model_type, config.num_labels) == ("shrp_roberta", family, 2)
    assert shrp_hf.ShrpRobertaConfig.from_pretrained(tmp_path, num_labels=5).num_labels == 5


def test_shrp_class_reads_the_other_config_object_of_its_families(written):
    config = AutoConfig.from_pretrained(written / "xlm-roberta" / "stock")
    folder = written / "xlm-roberta" / "stock"
    model = shrp_hf.ShrpRobertaForSequenceClassification.from_pretrained(folder, config=config, dtype=torch.float64)
    assert model.config.stock_model_type == "xlm-roberta"
    message = (
        "`XLMRobertaConfig` is a checkpoint of the family `xlm-roberta`, but ShrpBertConfig reads `bert`, `shrp_bert`. Load "
        "it with the class of its own family."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        shrp_hf.ShrpBertModel.from_pretrained(folder, config=config)


# --- SHRP ---


@pytest.mark.parametrize("family", ["roberta", "xlm-roberta"])
@pytest.mark.parametrize("padding", ["left", "right", None])
def test_roberta_converts_to_shrp_and_is_pruned(written, tmp_path, family, padding):
    shrp_class = shrp_hf.ShrpRobertaForSequenceClassification
    model = shrp_class.from_pretrained(written / family / "stock", expert_layers=2, dtype=torch.float64)
    model.train()
    output = model(**inputs(family, padding), labels=torch.tensor([0, 1, 2, 0, 1]))
    output.loss.backward()
    assert all(layer.router.weight.grad.abs().sum() > 0 for layer in model.layers[1:])
    assert {layer: sum(counts) for layer, counts in model.usage().items()} == {1: 5, 2: 5}
    torch.testing.assert_close(output.loss, output.task_loss + 0.1 * output.balance_loss)
    for layer in model.eval().layers[1:]:
        layer.router.bias.data[2] = 1e4
    routed = outputs(model, family, padding)
    model.prune_heads(KeepPlan((ALL, (2,), (2,)), 4))
    torch.testing.assert_close(outputs(model, family, padding), routed, **EXACT)
    model.prune_heads({0: [1]})
    assert not any("router" in name for name in model.state_dict())
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float64)
    torch.testing.assert_close(outputs(loaded, family, padding), outputs(model, family, padding), **EXACT)


@pytest.mark.parametrize("family", WITHOUT_EXPERTS)
def test_family_without_expert_layers_says_so(written, family):
    shrp = to_shrp(stock(family))
    message = (
        f"`expert_layers=[1]`: `{shrp.config.model_type}` has none; only BERT and RoBERTa convert to SHRP. Leave the field "
        "empty, its heads can still be pruned."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        type(shrp.config)(**TABLE[family][1], expert_layers=[1])
    message = (
        f"`{type(shrp).__name__}` has no expert layers: only BERT and RoBERTa convert to SHRP. Cut its heads and neurons "
        "instead (`prune_heads`)."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        type(shrp).from_pretrained(written / family / "stock", expert_layers=1)


# --- a layer without heads ---


@pytest.mark.parametrize("family", TABLE)
def test_layer_without_heads_adds_the_output_bias(family):
    path = TABLE[family][2].format(0)
    model = prune_heads(stock(family), KeepPlan(((), ALL, ALL), 4))
    output = model.base_model.get_submodule(path)
    assert list(output.state_dict()) == ["bias"]
    assert torch.equal(output.bias, stock(family).base_model.get_submodule(path).bias)
    before = outputs(model, family)
    output.bias.data *= -3  # a constant would be lost in the next LayerNorm
    assert not torch.allclose(outputs(model, family), before, atol=1e-3)


@pytest.mark.parametrize("family", ["roberta", "distilbert", "vit"])
def test_layer_without_heads_exports(family):
    model = prune_heads(stock(family), KeepPlan(((), ALL, ALL), 4))
    exported = torch.export.export(model, (), inputs(family)).module()
    torch.testing.assert_close(exported(**inputs(family))["logits"].flatten(), outputs(model, family), **EXACT)


@pytest.mark.parametrize("family", TABLE)
def test_attention_maps_show_the_heads_that_are_left(family):
    model = to_shrp(stock(family, attention="eager"))
    assert len(model(**inputs(family), output_attentions=True).attentions) == 3
    cut = prune_heads(model, MIXED)
    made = cut(**inputs(family), output_attentions=True, output_hidden_states=True)
    assert [attention.shape[1] for attention in made.attentions] == [2, 0, 1]
    assert len(made.hidden_states) == 4
    cut.set_attn_implementation("sdpa")
    # ViT's eager attention takes its softmax in float32.
    torch.testing.assert_close(cut(**inputs(family)).logits, made.logits, rtol=0, atol=1e-6 if family == "vit" else 1e-10)


def test_converted_layers_report_hidden_states_and_attentions():
    model = to_shrp(stock("roberta", attention="eager"))
    model(**inputs("roberta"), output_attentions=True, output_hidden_states=True)
    model.convert_layers_([2])
    made = model(**inputs("roberta"), output_attentions=True, output_hidden_states=True)
    assert [attention.shape[1] for attention in made.attentions] == [4, 4, 1]
    assert len(made.hidden_states) == 4


# --- ViT ---


@pytest.mark.parametrize("plan", [((0,), (3,), (1,)), ((0, 2), (1, 3), (0, 1)), (ALL, ALL, ALL)], ids=str)
def test_vit_with_equal_counts_is_a_plain_vit(tmp_path, plan):
    cut = prune_heads(stock("vit"), KeepPlan(plan, 4))
    plain = to_stock(cut, compact=True)
    plain.save_pretrained(tmp_path)
    loaded = transformers.ViTForImageClassification.from_pretrained(tmp_path, dtype=torch.float64)
    assert loaded.num_parameters() == cut.num_parameters()
    torch.testing.assert_close(outputs(loaded, "vit"), outputs(cut, "vit"), **EXACT)
    again = prune_heads(loaded, {0: [0]} if len(plan[0]) > 1 else {})
    assert again.config.head_size == HEAD_SIZE
    assert again.config.num_attention_heads == len(plan[0])


def test_masked_language_model_keeps_its_words_tied_on_disk(tmp_path):
    for family in ("electra", "distilbert", "camembert"):
        prune_heads(stock(family, "MaskedLM"), MIXED).save_pretrained(tmp_path / family)
        loaded = AutoModelForMaskedLM.from_pretrained(tmp_path / family)
        assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
