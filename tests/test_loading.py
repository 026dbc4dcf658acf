"""Saving and loading: saved equals loaded, here, in a fresh process and where shrp_hf is not installed."""

import copy
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertTokenizer,
    ViTConfig,
    ViTModel,
)

from shrp_hf import (
    KeepPlan,
    ShrpBertForMaskedLM,
    ShrpBertForSequenceClassification,
    ShrpBertForTokenClassification,
    prune_heads,
)
from tests.tiny import assert_near, batch, same_state, tiny_bert, tiny_routed

ALL = (0, 1, 2, 3)
ROOT = Path(__file__).parents[1]
WEIGHTS = "model.safetensors"
VIT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 4, "patch_size": 2}


def dense(**fields):
    return ShrpBertForSequenceClassification.from_stock(tiny_bert(**fields))


def cut(**fields):
    model = dense(**fields)
    model.prune_heads(KeepPlan(((0, 3), (), (1,)), 4))
    return model


def routed(**fields):
    model = tiny_routed([0, 2], **fields)
    model.train()(**batch()).balance_loss.backward()  # so that usage is counted
    return model.eval()


def pending(**fields):
    model = dense(**fields)
    model.convert_layers_(2, pending=True)
    model.activate_layer_(2)
    return model


def static(**fields):
    model = tiny_routed(2, **fields)
    model.prune_heads(KeepPlan(((1, 2), (2,), (0, 3)), 4))
    return model


def logits_of(model, inputs=None):
    with torch.no_grad():
        return model(**(inputs or batch())).logits


def realigned(model):
    """A copy in memory of its own: memory-mapped weights are not aligned, and kernels then round the last bit otherwise."""
    return copy.deepcopy(model)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- the same process ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("build", [dense, cut, routed, pending, static])
def test_loaded_is_saved(build, dtype, tmp_path):
    model = build(dtype=dtype)
    model.save_pretrained(tmp_path, with_code=False)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", WEIGHTS}
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(loaded) is ShrpBertForSequenceClassification
    assert same_state(loaded, model)
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    assert loaded.usage() == model.usage()
    assert torch.equal(logits_of(realigned(loaded)), logits_of(model))
    for name in ("expert_layers", "pending_layers", "kept_heads", "routed", "num_attention_heads"):
        assert getattr(loaded.config, name) == getattr(model.config, name)


def test_task_head_opens_as_base_model_and_base_model_as_task_head(tmp_path):
    model = static()
    model.save_pretrained(tmp_path / "head")
    base = AutoModel.from_pretrained(tmp_path / "head")
    with torch.no_grad():
        assert torch.equal(realigned(base)(**batch())[0], model.bert(**batch())[0])
    base.save_pretrained(tmp_path / "base")
    head = ShrpBertForTokenClassification.from_pretrained(tmp_path / "base")
    assert same_state(head.bert.encoder, model.bert.encoder)
    assert logits_of(head).shape == (5, 9, 3)


def test_masked_lm_is_tied_after_loading(tmp_path):
    model = tiny_routed(2, head=ShrpBertForMaskedLM)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert torch.equal(logits_of(realigned(loaded)), logits_of(model))


def test_implementation_of_attention_and_precision_are_chosen_on_loading(tmp_path):
    tiny_bert(attn_implementation="eager").save_pretrained(tmp_path)
    for attention in ("eager", "sdpa"):
        model = ShrpBertForSequenceClassification.from_pretrained(
            tmp_path, expert_layers=2, attn_implementation=attention, dtype=torch.float64, device_map="cpu"
        )
        assert model.config._attn_implementation == attention
        assert {p.dtype for p in model.parameters()} == {torch.float64}
        assert model.layers[1].attention.self.config._attn_implementation == attention


# --- plain checkpoints ---


def as_saved(folder):
    pass


def with_the_names_of_old(folder):
    """As in bert-base-uncased: LayerNorm has a gamma and a beta, and the positions are in the file."""
    state = load_file(folder / WEIGHTS)
    for new, old in (("weight", "gamma"), ("bias", "beta")):
        state = {name.replace(f"LayerNorm.{new}", f"LayerNorm.{old}"): value for name, value in state.items()}
    save_file(state | {"bert.embeddings.position_ids": torch.arange(40)[None]}, folder / WEIGHTS, metadata={"format": "pt"})


@pytest.mark.parametrize("rewrite", [as_saved, with_the_names_of_old])
def test_plain_checkpoint_equals_bert(rewrite, tmp_path):
    stock = tiny_bert()
    stock.save_pretrained(tmp_path)
    rewrite(tmp_path)
    model = ShrpBertForSequenceClassification.from_pretrained(tmp_path)
    assert same_state(model, stock)
    assert torch.equal(logits_of(realigned(model)), logits_of(stock))


@pytest.mark.parametrize(("given", "expected"), [(2, [1, 2]), ([0, 2], [0, 2])], ids=str)
def test_plain_checkpoint_is_converted_on_loading(given, expected, tmp_path):
    stock = tiny_bert()
    stock.save_pretrained(tmp_path)
    model, info = ShrpBertForSequenceClassification.from_pretrained(tmp_path, expert_layers=given, output_loading_info=True)
    assert (model.config.expert_layers, model.config.routed) == (expected, True)
    assert not info["missing_keys"]
    assert not model.training
    weight = stock.bert.encoder.layer[2].attention.output.dense.weight
    torch.testing.assert_close(model.layers[2].expander.dense.weight, weight.view(32, 4, 8).mean(dim=1) * 2)
    assert torch.equal(model.layers[2].attention.self.key.weight, stock.bert.encoder.layer[2].attention.self.key.weight)


def test_plain_config_may_be_passed(tmp_path):
    tiny_bert().save_pretrained(tmp_path)
    config = BertConfig.from_pretrained(tmp_path, num_labels=7)
    model = ShrpBertForSequenceClassification.from_pretrained(
        tmp_path, config=config, expert_layers=1, ignore_mismatched_sizes=True
    )
    assert model.config.model_type == "shrp_bert"
    assert logits_of(model).shape == (5, 7)


def pruned_by_transformers_4(folder, removed):
    """What `prune_heads` and `save_pretrained` of Transformers 4 leave behind: `removed` is {layer: [heads]}."""
    stock = tiny_bert(dtype=torch.float64)
    stock.save_pretrained(folder)
    state = load_file(folder / WEIGHTS)
    for layer, heads in removed.items():
        kept = [h * 8 + i for h in ALL if h not in heads for i in range(8)]
        prefix = f"bert.encoder.layer.{layer}.attention."
        for name in (f"self.{projection}.{kind}" for projection in ("query", "key", "value") for kind in ("weight", "bias")):
            state[prefix + name] = state[prefix + name][kept].clone()
        name = f"{prefix}output.dense.weight"
        with torch.no_grad():
            stock.get_parameter(name)[:, [h * 8 + i for h in heads for i in range(8)]] = 0  # masked
        state[name] = state[name][:, kept].clone()
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["pruned_heads"] = {str(layer): heads for layer, heads in removed.items()}
    (folder / "config.json").write_text(json.dumps(config))
    return stock


@pytest.mark.parametrize(
    ("removed", "kept"),
    [
        ({0: [1, 3], 2: [0]}, [[0, 2], [0, 1, 2, 3], [1, 2, 3]]),
        ({1: [0, 1, 2, 3]}, [[0, 1, 2, 3], [], [0, 1, 2, 3]]),
    ],
    ids=["some heads", "a whole layer"],
)
def test_checkpoint_pruned_by_transformers_4_loads(removed, kept, tmp_path):
    masked = pruned_by_transformers_4(tmp_path, removed)
    model = ShrpBertForSequenceClassification.from_pretrained(tmp_path)
    assert model.config.kept_heads == kept
    torch.testing.assert_close(logits_of(model), logits_of(masked), rtol=0, atol=1e-10)
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "again")
    assert torch.equal(logits_of(realigned(again)), logits_of(realigned(model)))


# --- saving ---


def test_saving_over_an_older_save_leaves_nothing_of_it(tmp_path):
    routed().save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    (tmp_path / "notes.txt").write_text("mine")
    model = static()
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir() if path.suffix != ".py"} == {"config.json", WEIGHTS, "notes.txt"}
    loaded = ShrpBertForSequenceClassification.from_pretrained(tmp_path)
    assert same_state(loaded, model)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert not (tmp_path / WEIGHTS).exists()
    assert same_state(ShrpBertForSequenceClassification.from_pretrained(tmp_path), model)


@pytest.mark.parametrize("failing", ["_write_code", "write_text"])
def test_save_that_fails_leaves_the_files_as_they_were(failing, tmp_path, monkeypatch):
    routed().save_pretrained(tmp_path)
    before = contents(tmp_path)

    def full_disk(*args, **kwargs):
        raise OSError("No space left on device")

    owner = Path if failing == "write_text" else ShrpBertForSequenceClassification
    monkeypatch.setattr(owner, failing, full_disk)
    with pytest.raises(OSError, match="No space left"):
        static().save_pretrained(tmp_path)
    assert contents(tmp_path) == before


def test_code_is_written_unless_it_is_not_wanted(tmp_path):
    model = static()
    model.save_pretrained(tmp_path / "coded")
    config = json.loads((tmp_path / "coded" / "config.json").read_text())
    assert set(config["auto_map"]) == {
        "AutoConfig",
        "AutoModel",
        "AutoModelForMaskedLM",
        "AutoModelForMultipleChoice",
        "AutoModelForQuestionAnswering",
        "AutoModelForSequenceClassification",
        "AutoModelForTokenClassification",
    }
    for entry in config["auto_map"].values():
        module, _, name = entry.partition(".")
        assert f"class {name}(" in (tmp_path / "coded" / f"{module}.py").read_text()
    model.save_pretrained(tmp_path / "plain", with_code=False)
    assert "auto_map" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    assert not list((tmp_path / "plain").glob("*.py"))
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "coded")  # here shrp_hf is installed
    assert type(loaded) is ShrpBertForSequenceClassification


def test_code_of_an_earlier_save_goes_and_other_files_stay(tmp_path):
    (tmp_path / "mine.py").write_text("print()")
    static().save_pretrained(tmp_path)
    (tmp_path / "modeling_shrp.py").write_text("from .gone import x\nfrom .older_part import y\n")  # by another release
    (tmp_path / "older_part.py").write_text("y = 1\n")
    (tmp_path / "gone.py").write_text("x = 1\n")
    static().save_pretrained(tmp_path)
    assert not {"gone.py", "older_part.py"} & {path.name for path in tmp_path.iterdir()}
    prune_heads(ViTModel(ViTConfig(**VIT)), {0: [1]}).save_pretrained(tmp_path)
    code = {path.name for path in tmp_path.glob("*.py")}
    assert "modeling_shrp_vit.py" in code
    assert not [name for name in code if "bert" in name]
    static().save_pretrained(tmp_path, with_code=False)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", WEIGHTS, "mine.py"}


def test_a_file_of_the_user_is_not_overwritten_by_the_code(tmp_path):
    (tmp_path / "saving.py").write_text("MONEY = 100\n")
    with pytest.raises(OSError, match="its code has a file `saving.py`, and the one there is not ours: choose another"):
        static().save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"saving.py"}
    static().save_pretrained(tmp_path, with_code=False)
    assert (tmp_path / "saving.py").read_text() == "MONEY = 100\n"


def test_code_of_another_release_replaces_the_config_last(tmp_path, monkeypatch):
    model = static()
    model.save_pretrained(tmp_path)
    (tmp_path / "slicing.py").write_text("OLD = True\n")
    replace = Path.replace

    def killed(path, target):
        if path.name == "modeling_shrp.py":
            raise KeyboardInterrupt
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        model.save_pretrained(tmp_path)
    assert not (tmp_path / "config.json").exists()  # half of the code is of one release, half of the other


def test_processes_that_save_to_one_directory_leave_each_other_alone(tmp_path):
    theirs = [tmp_path / f".saving-{process}-{platform.node()}-a_1" for process in (os.getppid(), 2**22 + 1)]
    for folder in theirs:
        folder.mkdir()
    static().save_pretrained(tmp_path)
    assert [folder.exists() for folder in theirs] == [True, False]  # one runs, one cannot


def test_config_alone_names_no_code(tmp_path):
    static().save_pretrained(tmp_path / "model")
    config = AutoConfig.from_pretrained(tmp_path / "model")
    named = dict(config.auto_map)
    config.save_pretrained(tmp_path / "alone")
    assert {path.name for path in (tmp_path / "alone").iterdir()} == {"config.json"}
    assert "auto_map" not in json.loads((tmp_path / "alone" / "config.json").read_text())
    assert config.auto_map == named


@pytest.mark.parametrize(
    "given", [{"max_shard_size": "20KB"}, {"safe_serialization": True}, {"variant": "fp16"}, {"state_dict": {}}], ids=str
)
def test_arguments_of_transformers_keep_the_code(given, tmp_path):
    model = static()
    if "state_dict" in given:
        given = {"state_dict": {name: value * 2 for name, value in model.state_dict().items()}}
    model.save_pretrained(tmp_path, **given)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == dict(model.auto_classes)
    options = {"variant": "fp16"} if "variant" in given else {}
    loaded = ShrpBertForSequenceClassification.from_pretrained(tmp_path, **options)
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value * 2 if "state_dict" in given else value), name


def test_wrapped_and_derived_classes_ship_the_code_of_ours(tmp_path):
    class Mine(ShrpBertForSequenceClassification):
        pass

    model = static()
    for name, cls in {"derived": Mine, "by FSDP": type("FSDPShrpBertForSequenceClassification", (type(model),), {})}.items():
        model.__class__ = cls  # as FSDP2 does
        model.save_pretrained(tmp_path / name)
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["auto_map"] == dict(model.auto_classes)
        assert (tmp_path / name / "modeling_shrp_bert.py").exists()
        assert not (tmp_path / name / "test_loading.py").exists()


@pytest.mark.parametrize("with_code", [False, True])
@pytest.mark.parametrize("door", ["push_to_hub", "save_pretrained"])
def test_push_to_hub_uploads_what_save_pretrained_writes(door, with_code, tmp_path, monkeypatch):
    hub, model = tmp_path / "hub", static()

    def create_repo(self, repo_id, **kwargs):
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    def create_commit(self, repo_id, operations, **kwargs):
        (hub / repo_id).mkdir(parents=True)
        for operation in operations:
            shutil.copy(operation.path_or_fileobj, hub / repo_id / operation.path_in_repo)

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", create_commit)
    if door == "push_to_hub":
        model.push_to_hub("org/shrp", with_code=with_code)
    else:
        model.save_pretrained(tmp_path / "local", push_to_hub=True, repo_id="org/shrp", with_code=with_code)
    model.save_pretrained(tmp_path / "saved", with_code=with_code)
    uploaded = contents(hub / "org/shrp")
    uploaded.pop("README.md")
    assert uploaded == contents(tmp_path / "saved")
    assert ("modeling_shrp_bert.py" in uploaded) is with_code
    assert same_state(ShrpBertForSequenceClassification.from_pretrained(hub / "org/shrp"), model)
    model.save_pretrained(tmp_path / "later")
    assert (tmp_path / "later" / "modeling_shrp_bert.py").exists()  # the wish held for one upload


# --- fresh processes ---

OPENS_WITH_SHRP_HF = """
import copy, torch
import shrp_hf
from transformers import AutoModel, AutoModelForSequenceClassification, pipeline
inputs = torch.load("inputs.pt")
with torch.no_grad():
    found = {}
    for name in ("routed", "static"):
        found[name] = copy.deepcopy(AutoModelForSequenceClassification.from_pretrained(name))(**inputs).logits
        found[name + " base"] = copy.deepcopy(AutoModel.from_pretrained(name))(**inputs).last_hidden_state
found["pipeline"] = pipeline("text-classification", model="static", top_k=None)(["w7 w8 w9", "w50 w60"])
torch.save(found, "found.pt")
"""

OPENS_WITHOUT_SHRP_HF = """
import copy, json, os, sys, torch
sys.modules["shrp_hf"] = None  # not installed, however the tests are run
from types import SimpleNamespace
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, pipeline
inputs = torch.load("inputs.pt")
trust = {"trust_remote_code": True}
with torch.no_grad():
    found = {}
    for name in ("routed", "static"):
        model = copy.deepcopy(AutoModelForSequenceClassification.from_pretrained(name, **trust))
        found[name] = model(**inputs).logits
        found[name + " base"] = copy.deepcopy(AutoModel.from_pretrained(name, **trust))(**inputs).last_hidden_state
    assert AutoConfig.from_pretrained("static", **trust).kept_heads == [[1, 2], [2], [0, 3]]
    model.save_pretrained("again")
    config = json.load(open("again/config.json"))
    assert len(config["auto_map"]) == 7, config["auto_map"]
    model.save_pretrained("bare", with_code=False)
    assert sorted(os.listdir("bare")) == ["config.json", "model.safetensors"]
    assert "auto_map" not in json.load(open("bare/config.json"))
    assert type(AutoModel.from_pretrained("again", **trust)).__name__ == "ShrpBertModel"
    again = copy.deepcopy(AutoModelForSequenceClassification.from_pretrained("again", **trust))
    assert torch.equal(again(**inputs).logits, found["static"])
    again.prune_heads(SimpleNamespace(kept=((1,), (2,), (3,)), num_heads=4))
    assert again(**inputs).logits.shape == found["static"].shape
found["pipeline"] = pipeline("text-classification", model="static", top_k=None, **trust)(["w7 w8 w9", "w50 w60"])
assert not [name for name in sys.modules if name.startswith("shrp_hf.")]
torch.save(found, "found.pt")
"""


@pytest.mark.parametrize("installed", [True, False], ids=["shrp_hf", "remote code"])
def test_loaded_in_a_fresh_process_is_saved(installed, tmp_path):
    models = {"routed": routed(), "static": static()}
    vocabulary = {token: i for i, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])}
    vocabulary |= {f"w{i}": i for i in range(5, 99)}
    tokenizer = BertTokenizer(vocab=vocabulary, model_max_length=40)
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    torch.save(batch(), tmp_path / "inputs.pt")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    if installed:
        environment["PYTHONPATH"] = str(ROOT)
    code = OPENS_WITH_SHRP_HF if installed else OPENS_WITHOUT_SHRP_HF
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    found = torch.load(tmp_path / "found.pt")
    for name, model in models.items():
        assert torch.equal(found[name], logits_of(model))
        with torch.no_grad():
            assert torch.equal(found[f"{name} base"], model.bert(**batch()).last_hidden_state)
    ids = tokenizer(["w7 w8 w9", "w50 w60"], padding=True, return_tensors="pt")
    expected = logits_of(models["static"], dict(ids)).softmax(dim=-1)
    for scores, row in zip(found["pipeline"], expected, strict=True):
        by_label = {score["label"]: score["score"] for score in scores}
        assert_near([by_label[f"LABEL_{i}"] for i in range(3)], row)
