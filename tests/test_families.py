"""Every family: cut equals masked, saved equals loaded, back to stock equals cut, whatever the attention and the padding."""

import copy
import functools
import json
import math
import re
import subprocess
import sys

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

import shrp_hf
from shrp_hf import KeepPlan, masked_heads, prune_heads, to_shrp, to_stock
from shrp_hf.families import FAMILIES, head_layout
from shrp_hf.measuring import count_flops, count_parameters
from shrp_hf.numerics import rounding_bound
from tests.tiny import SIZES, assert_near, batch, force_experts_, randomize_, same_state

HEAD_SIZE = 8
ALL = (0, 1, 2, 3)
PLANS = {
    "some": KeepPlan(((0, 2), ALL, (1, 2, 3)), 4),
    "one": KeepPlan(((3,), (0,), ALL), 4),
    "none": KeepPlan(((), ALL, ()), 4),
}
MIXED = KeepPlan(((1, 3), (), (2,)), 4)
EXPERTS = KeepPlan(((0, 2), (2,), (1, 3)), 4)
THIN = MIXED.with_neurons((range(20, 40), (), (7,)), 64)
EXACT = {"rtol": 0, "atol": 1e-10}
DISTILBERT_SIZES = {"n_layers": 3, "n_heads": 4, "dim": 32, "hidden_dim": 64, "vocab_size": 99, "num_labels": 3}
VIT_SIZES = {"image_size": 16, "patch_size": 4} | SIZES
OUTPUT = "encoder.layer.{}.attention.output.dense"
# Every kind of relative attention: v3 shares the projections of query and key with the positions, v2 has its own.
DEBERTA_V3 = SIZES | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8}
DEBERTA_V3 |= {"share_att_key": True, "norm_rel_ebd": "layer_norm", "position_biased_input": False}
DEBERTA_V2 = DEBERTA_V3 | {"share_att_key": False, "conv_kernel_size": 3, "type_vocab_size": 2}
SPECIAL = dict.fromkeys(("pad_token_id", "cls_token_id", "bos_token_id", "sep_token_id", "eos_token_id"), 0)
# One layer attends everywhere, two within a window of four tokens to either side.
MODERNBERT = SIZES | SPECIAL | {"local_attention": 8}
# Model type: prefix of the classes, fields, where layer i has its output projection.
TABLE = {
    "bert": ("Bert", SIZES, OUTPUT),
    "roberta": ("Roberta", SIZES, OUTPUT),
    "xlm-roberta": ("XLMRoberta", SIZES, OUTPUT),
    "camembert": ("Camembert", SIZES, OUTPUT),
    "electra": ("Electra", SIZES | {"embedding_size": 16}, OUTPUT),
    "distilbert": ("DistilBert", DISTILBERT_SIZES, "transformer.layer.{}.attention.out_lin"),
    "mpnet": ("MPNet", SIZES, "encoder.layer.{}.attention.attn.o"),
    "deberta-v2": ("DebertaV2", DEBERTA_V2, OUTPUT),
    "deberta-v3": ("DebertaV2", DEBERTA_V3, OUTPUT),
    "modernbert": ("ModernBert", MODERNBERT, "layers.{}.attn.Wo"),
    "nomic_bert": ("NomicBert", SIZES, "layers.{}.self_attn.o_proj"),
    "vit": ("ViT", VIT_SIZES, "layers.{}.attention.o_proj"),
}
TEXT_HEADS = ["MaskedLM", "MultipleChoice", "QuestionAnswering", "SequenceClassification", "TokenClassification"]
HEADS = {family: TEXT_HEADS for family in TABLE} | {"electra": [*TEXT_HEADS, "PreTraining"], "vit": ["ImageClassification"]}
HEADS["nomic_bert"] = ["MaskedLM", "SequenceClassification", "TokenClassification"]
EAGER_ONLY = ("mpnet", "deberta-v2", "deberta-v3")
ATTENTIONS = [(family, attention) for family in TABLE for attention in ("eager", "sdpa")[: 1 if family in EAGER_ONLY else 2]]
CASES = [(family, head) for family in TABLE for head in HEADS[family]]
CONVERSIONS = [
    (*case, padding)
    for case in ATTENTIONS
    for padding in (("left", "right", None) if case[0] != "vit" else (None,))
    if case[0] != "camembert"
]


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
    model.set_attn_implementation("eager" if family in EAGER_ONLY else attention)
    return model


def inputs(family: str, padding: str | None = "right", dtype: torch.dtype = torch.float64, head: str = "") -> dict:
    if family == "vit":
        return {"pixel_values": torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1)).to(dtype)}
    made = batch(padding)
    if family == "modernbert" and padding is not None:
        # A padded position whose window holds no real token is NaN in stock eager attention, in float64 alone.
        made["attention_mask"][2] = made["attention_mask"][1]
        made["attention_mask"][1:3, 3:6] = 1
    if padding is not None:  # RoBERTa counts positions from what is not padding
        pad = 1 if family in ("roberta", "xlm-roberta", "camembert", "mpnet") else 0
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
    ("family", "attention", "padding"),
    [(*case, padding) for case in ATTENTIONS for padding in ("left", "right", None) if case[0] != "vit" or padding is None],
)
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
    assert_near(outputs(cut, family), outputs(silenced(model.double(), family, MIXED), family))


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
    # Where a layer begins with a norm and has no heads and no output bias, nothing reads that norm.
    unread = {"vit": [f"vit.layers.1.layernorm_before.{kind}" for kind in ("weight", "bias")]}
    assert without == (unread | {"modernbert": ["model.layers.1.attn_norm.weight"]}).get(family, [])


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
    models = [stock(family) for family in TABLE]
    assert {each.config.model_type for model in models for each in (model, to_shrp(model))} == set(FAMILIES)


@pytest.mark.parametrize("family", EAGER_ONLY)
def test_attention_that_the_stock_class_lacks_is_refused_with_its_message(family):
    said = []
    for model in (stock(family), prune_heads(stock(family), MIXED)):
        with pytest.raises(ValueError, match="does not support an attention implementation through torch") as refused:
            type(model)._from_config(model.config, attn_implementation="sdpa")
        said.append(str(refused.value).replace(type(model).__name__, type(model).__name__.removeprefix("Shrp")))
    assert said[0] == said[1]


# --- files ---


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """One directory per family with its stock, its cut, its silent and its expert model, and what they say."""
    root = tmp_path_factory.mktemp("families")
    for family in TABLE:
        model = stock(family)
        cut = prune_heads(model, THIN)
        model.save_pretrained(root / family / "stock")
        cut.save_pretrained(root / family / "cut")
        to_stock(cut).save_pretrained(root / family / "silent")
        experts = prune_heads(routed_model(family), EXPERTS)
        experts.save_pretrained(root / family / "experts")
        for kind, says in (("cut", cut), ("silent", cut), ("experts", experts)):
            torch.save((inputs(family), outputs(says, family)), root / family / kind / "said.pt")
    return root


READ_ALL = """
import json, sys, torch
{before}
from pathlib import Path
from transformers import AutoModel, AutoModelForImageClassification, AutoModelForSequenceClassification
found = {{}}
for folder in map(Path, sys.argv[1:]):
    trust = {{"trust_remote_code": True}} if {trust} and folder.name != "silent" else {{}}
    auto = AutoModelForImageClassification if folder.parent.name == "vit" else AutoModelForSequenceClassification
    model = auto.from_pretrained(folder, dtype=torch.float64, **trust)
    batch, expected = torch.load(folder / "said.pt")
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
    folders = [written / family / kind for family in TABLE for kind in ("cut", "experts")]
    for family, _, name, module, base in read_all(folders, "import shrp_hf", False):
        shrp = to_shrp(stock(family))
        assert (name, module, base) == (type(shrp).__name__, type(shrp).__module__, shrp.base_model_class.__name__)


def test_silent_models_and_remote_code_load_without_us(written):
    folders = [written / family / "silent" for family in TABLE]
    folders += [written / family / kind for family in TABLE for kind in ("cut", "experts")]
    for family, kind, name, module, base in read_all(folders, "sys.modules['shrp_hf'] = None", True):
        prefix = "Roberta" if kind != "silent" and TABLE[family][0] in ("XLMRoberta", "Camembert") else TABLE[family][0]
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


def labels(family: str, head: str = "") -> torch.Tensor:
    return torch.arange(len(next(iter(inputs(family, head=head).values())))) % 3


@pytest.mark.parametrize(("family", "attention", "padding"), CONVERSIONS)
def test_family_converts_to_shrp_and_is_pruned(written, tmp_path, family, attention, padding):
    shrp_class = type(to_shrp(stock(family)))
    options = {"dtype": torch.float64, "attn_implementation": "eager" if family in EAGER_ONLY else attention}
    model = shrp_class.from_pretrained(written / family / "stock", expert_layers=2, **options)
    for layer in (1, 2):  # the warm start: sqrt(4) times the mean of the four slices of W_O
        weight = stock(family).base_model.get_submodule(TABLE[family][2].format(layer)).weight
        start = model.layers[layer].expander.dense.weight
        torch.testing.assert_close(start, weight.view(32, 4, HEAD_SIZE).mean(dim=1) * 2, **EXACT)
    model.train()
    output = model(**inputs(family, padding), labels=labels(family))
    output.loss.backward()
    assert all(layer.router.weight.grad.abs().sum() > 0 for layer in model.layers[1:])
    assert {layer: sum(counts) for layer, counts in model.usage().items()} == dict.fromkeys((1, 2), len(labels(family)))
    torch.testing.assert_close(output.loss, output.task_loss + 0.1 * output.balance_loss)
    for layer, expert in ((1, 2), (2, 3)):
        force_experts_(model, layer, [expert])
    routed = outputs(model.eval(), family, padding)
    model.prune_heads(KeepPlan((ALL, (2,), (3,)), 4))
    torch.testing.assert_close(outputs(model, family, padding), routed, **EXACT)
    model.prune_heads({0: [1]})
    assert not any("router" in name for name in model.state_dict())
    model.save_pretrained(tmp_path)
    auto = AutoModelForImageClassification if family == "vit" else AutoModelForSequenceClassification
    loaded = auto.from_pretrained(tmp_path, **options)
    torch.testing.assert_close(outputs(loaded, family, padding), outputs(model, family, padding), **EXACT)


def routed_model(family: str, top: int = 1, head: str | None = None, attention: str = "sdpa") -> PreTrainedModel:
    """Its last two layers are expert layers, in evaluation mode."""
    model = to_shrp(stock(family, head, attention=attention))
    model.config.experts_per_sequence = top
    model.convert_layers_([1, 2])
    randomize_(model)
    return model.eval()


def scores_of(family: str, model: PreTrainedModel, query: torch.Tensor, key: torch.Tensor, given: dict, parts: list) -> tuple:
    """Attention scores (length, length) of one expert by the definition of its family, and where it may not look."""
    length, kind = len(query), model.base_model
    apart = torch.arange(length)[:, None] - torch.arange(length)
    blocked = torch.zeros(length, length, dtype=torch.bool)
    if family in ("modernbert", "nomic_bert"):
        turn = sys.modules[type(stock(family)).__module__].apply_rotary_pos_emb
        query, key = (x[0, 0] for x in turn(query[None, None], key[None, None], *given["position_embeddings"]))
        if family == "modernbert" and model.config.layer_types[given["layer"]] == "sliding_attention":
            blocked = apart.abs() > 4
    if not family.startswith("deberta"):
        scores = query @ key.T / math.sqrt(HEAD_SIZE)
        if family == "mpnet":
            buckets = kind.encoder.relative_position_bucket(-apart)
            scores = scores + kind.encoder.relative_attention_bias.weight[buckets, given["expert"]]
        return scores, blocked
    scale = torch.tensor(3.0 * HEAD_SIZE).sqrt().double()  # which the stock class takes in float32
    table, relative = kind.encoder.get_rel_embedding()[:16], given["relative_pos"][0]
    keys, queries = (table @ weight.T + bias for weight, bias in parts)
    scores = torch.zeros(length, length, dtype=torch.float64)
    for i in range(length):
        for j in range(length):
            to_position = query[i] @ keys[(relative[i, j] + 8).clamp(0, 15)]
            from_position = key[j] @ queries[(8 - relative[j, i]).clamp(0, 15)]
            scores[i, j] = (query[i] @ key[j] + to_position + from_position) / scale
    return scores, blocked


@pytest.mark.parametrize("top", [1, 3, 4])
@pytest.mark.parametrize("family", sorted(set(TABLE) - {"xlm-roberta", "camembert"}))
@torch.no_grad()
def test_expert_layer_is_its_definition(family, top):
    """out = x + LN(GELU(W mean(h) + b)): each sequence and each expert alone, over the real tokens; read is x or norm(x)."""
    model, seen = routed_model(family, top), []
    layer, padding = model.layers[2], None if family == "vit" else "left"
    layer.register_forward_pre_hook(lambda _, args, kwargs: seen.append((args[0], kwargs)), with_kwargs=True)
    layer.register_forward_hook(lambda _, args, output: seen.append(output[:2]))
    made = inputs(family, padding)
    model(**made)
    (hidden, given), (found, logits) = seen
    real = made.get("attention_mask", torch.ones(hidden.shape[:2])).bool()
    norm = {"vit": "layernorm_before", "modernbert": "attn_norm"}.get(family)
    read = hidden if norm is None else stock_layer(family, model, norm)(hidden)
    means = torch.stack([row[keep].mean(dim=0) for row, keep in zip(read, real, strict=True)])
    torch.testing.assert_close(logits, means @ layer.router.weight.T + layer.router.bias, **EXACT)
    matrices = head_layout(model).heads_in(2)
    for row, keep in enumerate(real):
        heads = []
        for expert in logits[row].topk(top).indices.tolist():
            own = slice(expert * HEAD_SIZE, (expert + 1) * HEAD_SIZE)
            parts = [(weight[own], 0 if bias is None else bias[own]) for weight, bias in matrices]
            query, key, value = (read[row] @ weight.T + bias for weight, bias in parts[:3])
            positions = parts[3:] or parts[1::-1]  # of keys, then of queries
            scores, blocked = scores_of(family, model, query, key, given | {"expert": expert, "layer": 2}, positions)
            heads.append(scores.masked_fill(blocked | ~keep, -math.inf).softmax(dim=-1) @ value)
        expander = layer.expander
        update = torch.stack(heads).mean(dim=0) @ expander.dense.weight.T + expander.dense.bias
        update = expander.LayerNorm(torch.nn.functional.gelu(update))
        torch.testing.assert_close(found[row][keep], (hidden[row] + update)[keep], **EXACT)


def stock_layer(family: str, model: PreTrainedModel, path: str) -> torch.nn.Module:
    """The stock module at a path of layer 2, with the weights that the model has there."""
    module = copy.deepcopy(to_stock(to_shrp(stock(family))).base_model.layers[2].get_submodule(path))
    module.load_state_dict(model.layers[2].get_submodule(path).state_dict())
    return module


@pytest.mark.parametrize("family", TABLE)
def test_pending_layer_runs_as_the_stock_layer_until_it_is_activated(family, tmp_path):
    model, dense = to_shrp(stock(family)), outputs(stock(family), family)
    names = set(model.state_dict())
    model.convert_layers_([1, 2], pending=True)
    torch.testing.assert_close(outputs(model, family), dense, **EXACT)
    said = []
    for each in (model, stock(family)):  # with dropout, where the stock layer has it
        torch.manual_seed(3)
        said.append(outputs(each.train(), family))
        each.eval()
    torch.testing.assert_close(*said, **EXACT)
    assert family in ("modernbert", "nomic_bert", "vit") or not torch.allclose(said[0], dense, atol=1e-3)  # theirs is 0
    added = {name for name in model.state_dict() if ".router." in name or ".expander." in name}
    assert set(model.state_dict()) - added == names
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.float64)
    torch.testing.assert_close(outputs(loaded, family), dense, **EXACT)
    at_once = copy.deepcopy(model)
    for each, steps in ((loaded, (2, 1)), (at_once, (1, 2))):
        for layer in steps:
            each.activate_layer_(layer)
        each.finish_conversion_()
    assert same_state(loaded, at_once)
    assert list(loaded.state_dict()) == list(at_once.state_dict())
    torch.testing.assert_close(outputs(loaded, family), outputs(at_once, family), **EXACT)
    assert not torch.allclose(outputs(loaded, family), dense, atol=1e-3)


@pytest.mark.parametrize(("family", "head"), [case for case in CASES if case[0] not in ("xlm-roberta", "camembert")])
def test_every_task_head_passes_on_what_the_routers_said(family, head):
    model = routed_model(family, head=head)
    base = model.base_model
    made = inputs(family, head=head)
    flat = {name: value.flatten(0, 1) for name, value in made.items()} if head == "MultipleChoice" else made
    output = model(**made)
    expected = base(**flat)
    assert len(output.router_logits) == 2
    for found, alone in zip(output.router_logits, expected.router_logits, strict=True):
        torch.testing.assert_close(found, alone, **EXACT)
    torch.testing.assert_close(output.balance_loss, expected.balance_loss, **EXACT)
    as_tuple = base(**flat, return_dict=False)
    assert type(as_tuple) is tuple
    assert torch.equal(as_tuple[0], expected[0])


@pytest.mark.parametrize("family", TABLE)
def test_experts_are_refused_by_name_where_they_cannot_be(family):
    model = routed_model(family)
    with pytest.raises(ValueError, match=r"^Layers \[1, 2\] are expert layers"):
        to_stock(model)
    path = head_layout(model).layer_map.heads_in[0].path
    adapted = to_shrp(stock(family))
    get_peft_model(adapted, LoraConfig(r=2))
    message = f"`{path}` of layer 2 is adapted in place (PEFT): merge the adapter first"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        adapted.convert_layers_(1)


@pytest.mark.parametrize("family", sorted(set(TABLE) - {"xlm-roberta", "camembert"}))
def test_experts_are_counted(family):
    one = prune_heads(routed_model(family), KeepPlan((ALL, (1,), (1,)), 4))
    assert count_parameters(one).whole < count_parameters(stock(family)).whole
    assert count_flops(one, 2, 6) < count_flops(stock(family), 2, 6)


@pytest.mark.parametrize("top", [1, 2])
@pytest.mark.parametrize("family", sorted(set(TABLE) - {"xlm-roberta", "camembert"}))
def test_adapter_of_routed_experts_is_merged(family, top):
    adapted = get_peft_model(routed_model(family, top), LoraConfig(r=2)).eval()
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
    expected = outputs(adapted, family)
    assert not torch.allclose(expected, outputs(routed_model(family, top), family), atol=1e-3)
    torch.testing.assert_close(outputs(adapted.merge_and_unload(), family), expected, **EXACT)


# --- a layer without heads ---


@pytest.mark.parametrize("family", sorted(set(TABLE) - {"modernbert", "nomic_bert"}))  # these have no output bias
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
    if family not in EAGER_ONLY:
        cut.set_attn_implementation("sdpa")
        # The eager attention of these two takes its softmax in float32.
        is_rounded = family in ("vit", "modernbert")
        bound = rounding_bound(float(made.logits.detach().abs().max()), torch.float32) if is_rounded else 1e-10
        torch.testing.assert_close(cut(**inputs(family)).logits, made.logits, rtol=0, atol=bound)


@pytest.mark.parametrize("family", TABLE)
def test_converted_layers_report_hidden_states_and_attentions(family):
    model = to_shrp(stock(family, attention="eager"))
    model(**inputs(family), output_attentions=True, output_hidden_states=True)
    model.convert_layers_([2], pending=True)
    for count in (4, 1):
        made = model(**inputs(family), output_attentions=True, output_hidden_states=True)
        assert [attention.shape[1] for attention in made.attentions] == [4, 4, count]
        assert len(made.hidden_states) == 4
        if count == 4:
            model.activate_layer_(2)


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
