"""Files that are damaged, mixed or of another family are refused, and left as they are."""

import json
import re
import shutil

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
)

from shrp_hf import ShrpBertForSequenceClassification, ShrpBertModel
from shrp_hf.plans.keep_plan import KeepPlan
from shrp_hf.pruning import prune_heads, to_shrp
from tests.tiny import SIZES, tiny_bert, tiny_routed

WEIGHTS = "model.safetensors"


def dense():
    return to_shrp(tiny_bert())


def routed():
    return tiny_routed([0, 2])


def static():
    return prune_heads(tiny_routed(2), KeepPlan(((1, 2), (2,), (0, 3)), 4))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def drop(state, name):
    del state[name]


def add(state, name):
    state[name] = torch.zeros(2)


def shrink(state, name):
    state[name] = state[name][1:].clone()


@pytest.mark.parametrize(
    ("tamper", "problem", "name"),
    [
        pytest.param(drop, "missing", "bert.encoder.layer.1.expander.dense.weight", id="missing"),
        pytest.param(drop, "missing", "bert.encoder.layer.0.attention.self.key.bias", id="missing in an ordinary layer"),
        pytest.param(drop, "missing", "bert.embeddings.word_embeddings.weight", id="missing embeddings"),
        pytest.param(add, "unexpected", "bert.encoder.layer.1.router.weight", id="unexpected"),
    ],
)
def test_tampered_weights_are_refused(tamper, problem, name, tmp_path):
    static().save_pretrained(tmp_path)
    state = load_file(tmp_path / WEIGHTS)
    tamper(state, name)
    save_file(state, tmp_path / WEIGHTS, metadata={"format": "pt"})
    before = contents(tmp_path)
    message = (
        f"`{tmp_path}` does not fit its config: 1 encoder weights are {problem}, the first is `{name}`. The files are "
        "damaged or were mixed: download or save them again."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("options", [{}, {"ignore_mismatched_sizes": True}], ids=str)
def test_misshapen_weights_are_refused(options, tmp_path):
    static().save_pretrained(tmp_path)
    state = load_file(tmp_path / WEIGHTS)
    name = "bert.encoder.layer.2.attention.self.query.weight"
    shrink(state, name)
    save_file(state, tmp_path / WEIGHTS, metadata={"format": "pt"})
    message = (
        f"`{tmp_path}` does not fit its config: 1 encoder weights are mismatched, the first is `{name}`. The files are "
        "damaged or were mixed: download or save them again."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path, **options)


@pytest.mark.parametrize(
    ("sizes", "problem", "name"),
    [
        ([5, 64, 0], "3 encoder weights are mismatched", "bert.encoder.layer.0.intermediate.dense.bias"),
        ([0, 64, 0], "3 encoder weights are unexpected", "bert.encoder.layer.0.intermediate.dense.bias"),
        ([4, 64, 3], "3 encoder weights are missing", "bert.encoder.layer.2.intermediate.dense.bias"),
    ],
)
def test_widths_that_contradict_the_weights_are_refused(sizes, problem, name, tmp_path):
    prune_heads(tiny_bert(), KeepPlan.full(3, 4).with_neurons(((0, 1, 2, 3), range(64), ()), 64)).save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert fields["intermediate_sizes"] == [4, 64, 0]
    (tmp_path / "config.json").write_text(json.dumps(fields | {"intermediate_sizes": sizes}))
    message = f"does not fit its config: {problem}, the first is `{name}` (`intermediate_sizes[{name[19]}]` is"
    with pytest.raises(ValueError, match=re.escape(message)):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)


def test_config_of_another_model_is_refused(tmp_path):
    static().save_pretrained(tmp_path)
    routed().save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / "config.json", tmp_path / "config.json")
    message = (
        f"`{tmp_path}` does not fit its config: 20 encoder weights are missing, the first is "
        "`bert.encoder.layer.0.expander.LayerNorm.bias`. The files are damaged or were mixed: download or save them again."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)


def damaged(folder):
    """The whole message, with the reason that safetensors gives for these weights."""
    with pytest.raises(SafetensorError) as error:
        safe_open(folder / WEIGHTS, framework="pt")
    return f"^{re.escape(f'The weights of `{folder}` are damaged ({error.value}): download or save them again.')}$"


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.99])
@pytest.mark.parametrize("build", [dense, static])
def test_truncated_weights_are_refused(build, share, tmp_path):
    build().save_pretrained(tmp_path)
    whole = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=damaged(tmp_path)):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)


def test_tampered_header_is_refused(tmp_path):
    static().save_pretrained(tmp_path)
    whole = bytearray((tmp_path / WEIGHTS).read_bytes())
    whole[8:16] = b"\xff" * 8
    (tmp_path / WEIGHTS).write_bytes(whole)
    with pytest.raises(ValueError, match=damaged(tmp_path)):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)


def test_checkpoint_of_another_family_is_refused(tmp_path):
    DistilBertModel(DistilBertConfig(dim=8, n_layers=1, n_heads=2, hidden_dim=8, vocab_size=9)).save_pretrained(tmp_path)
    message = (
        f"`{tmp_path}` is a checkpoint of the family `distilbert`, but ShrpBertConfig reads `bert`, `shrp_bert`. Load it "
        "with the class of its own family."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        ShrpBertModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("option", [{"is_decoder": True}, {"add_cross_attention": True, "is_decoder": True}], ids=str)
def test_decoder_is_refused_on_loading(option, tmp_path):
    BertModel(BertConfig(**SIZES, **option)).save_pretrained(tmp_path)
    message = "`is_decoder=True` is not supported: shrp_hf makes encoders smaller. Set it to False."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        ShrpBertModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("build", "expert_layers", "message"),
    [
        pytest.param(
            static,
            [0],
            "`expert_layers=[0]` cannot be converted: this model is already pruned, and a warm start needs all heads. "
            "Convert the unpruned checkpoint.",
            id="pruned",
        ),
        pytest.param(dense, 4, "`expert_layers` must be between 1 and 3 layers, got 4.", id="too many"),
        pytest.param(dense, [3], "`expert_layers` names layer 3, but the model's layers are 0 to 2.", id="not there"),
        pytest.param(
            routed, 1, "`expert_layers` names [2], which are expert layers already: leave them out.", id="converted before"
        ),
    ],
)
def test_layers_that_do_not_fit_the_checkpoint_are_refused(build, expert_layers, message, tmp_path):
    build().save_pretrained(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        ShrpBertForSequenceClassification.from_pretrained(tmp_path, expert_layers=expert_layers)
    assert contents(tmp_path) == before
