"""The whole message of what is refused here: argument, value, way out."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from shrp_hf.models.configuration_shrp_bert import ShrpBertConfig
from shrp_hf.models.modeling_shrp_bert import ShrpBertForSequenceClassification
from shrp_hf.plans.budget import Budget
from shrp_hf.plans.keep_plan import KeepPlan
from shrp_hf.pruning import prune_heads, to_shrp
from shrp_hf.scoring import HeadStats, StatsRequest
from tests.tiny import tiny_bert

OPEN = ShrpBertForSequenceClassification.from_pretrained
DTYPES = "auto, float16, bfloat16, float32, float64"


def plan(**fields) -> Callable:
    return lambda folder: KeepPlan(**({"kept": ((0,),), "num_heads": 4} | fields))


def config(**fields) -> Callable:
    return lambda folder: ShrpBertConfig.from_dict(fields)


def cut(heads: object) -> Callable:
    return lambda folder: prune_heads(tiny_bert(), heads)


def index(content: object) -> Callable:
    """Opens a model of several files whose index holds `content`."""

    def call(folder: Path) -> None:
        to_shrp(tiny_bert()).save_pretrained(folder, max_shard_size="20KB")
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))
        OPEN(folder)

    return call


def config_file(text: str) -> Callable:
    def call(folder: Path) -> None:
        (folder / "config.json").write_text(text)
        OPEN(folder)

    return call


def scores(change: Callable[[bytes], bytes]) -> Callable:
    def call(folder: Path) -> None:
        path = folder / "scores"
        HeadStats.empty(StatsRequest(entropy=True), ((0, 1),), 2).save(path)
        path.write_bytes(change(path.read_bytes()))
        HeadStats.load(path)

    return call


def over_a_file(folder: Path) -> None:
    (folder / "model").write_text("a file")
    to_shrp(tiny_bert()).save_pretrained(folder / "model")


CASES = {
    "plan: num_heads": (plan(num_heads=0), "`num_heads` must be a positive whole number, got 0."),
    "plan: kept": (plan(kept=()), "`kept` must hold one tuple of head indices per layer, got ()."),
    "plan: layer": (plan(kept=(3,)), "`kept[0]` must be a tuple of head indices, got 3."),
    "plan: head": (plan(kept=((4,),)), "`kept[0]` names head 4, but heads are whole numbers from 0 to 3."),
    "plan: twice": (plan(kept=((1, 1),)), "`kept[0]` names a head twice: (1, 1)."),
    "plan: fields": (
        lambda folder: KeepPlan.from_json("{}"),
        'Not a keep plan: expected the fields "kept" and "num_heads", as `KeepPlan.to_json` writes.',
    ),
    "plan: no JSON": (
        lambda folder: KeepPlan.from_json("{"),
        "Not a keep plan: Expecting property name enclosed in double quotes: line 1 column 2 (char 1). A plan is JSON as "
        "`KeepPlan.to_json` writes it.",
    ),
    "budget": (lambda folder: Budget.heads(0), "`count` must be a positive whole number of heads, got 0."),
    "config: sizes": (config(num_hidden_layers=2**40), f"`num_hidden_layers` must be between 1 and 1,000, got {2**40}."),
    "config: padding": (config(vocab_size=5, pad_token_id=7), "`pad_token_id` must be one of 5 tokens, from 0 to 4, got 7."),
    "config: dtype": (config(dtype="load"), f"`dtype` must be one of {DTYPES}, got 'load'."),
    "config: activation": (
        config(hidden_act="__import__"),
        "`hidden_act` must be an activation that Transformers knows, such as 'gelu', got '__import__'.",
    ),
    "config: quantization": (config(quantization_config="x"), "`quantization_config` must be an object, got 'x'."),
    "config: version": (config(format_version="1"), "`format_version` must be a whole number, got '1'."),
    "config: pruned heads": (
        config(pruned_heads={"0": 1}),
        "`pruned_heads` must be an object {layer: [heads]}, got {'0': 1}.",
    ),
    "config: no object": (
        config_file("[]"),
        "`config.json` of `FOLDER` is damaged, it holds no JSON object: download or save it again.",
    ),
    "cut: no list": (cut({0: None}), "`plan` must name the heads of layer 0 by a list of whole numbers, got None."),
    "convert: no list": (
        lambda folder: to_shrp(tiny_bert()).convert_layers_(None),
        "`expert_layers` must be a number of layers or a list of their indices, got None.",
    ),
    "index: damaged": (
        index({"weight_map": []}),
        "`model.safetensors.index.json` of `FOLDER` is damaged: download or save the model again.",
    ),
    "index: elsewhere": (
        index({"metadata": {}, "weight_map": {"x": "../y.safetensors"}}),
        "`model.safetensors.index.json` of `FOLDER` names the file '../y.safetensors', which lies elsewhere: download it "
        "again.",
    ),
    "index: not there": (
        index({"metadata": {}, "weight_map": {"x": "y.safetensors"}}),
        "`model.safetensors.index.json` of `FOLDER` names the file 'y.safetensors', which is not there: download it again.",
    ),
    "scores: a flipped bit": (
        scores(lambda data: data[:-1] + bytes([data[-1] ^ 1])),
        "`FOLDER/scores` is damaged, its checksum is another: delete it, or name another.",
    ),
    "scores: nothing": (
        scores(lambda data: b""),
        "`FOLDER/scores` holds no head statistics (Error while deserializing header: header too small): delete it, or name "
        "another.",
    ),
    "plan: no directory": (
        lambda folder: KeepPlan(((0,),), 1).to_json(folder / "x" / "plan.json"),
        "`FOLDER/x/plan.json` cannot be written ([Errno 2] No such file or directory: 'PARTIAL'): what was there is as it "
        "was.",
    ),
    "model: over a file": (
        over_a_file,
        "The model cannot be saved to `FOLDER/model` ([Errno 17] File exists: 'FOLDER/model'): what was there is as it was.",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_message_is_whole(name, tmp_path, monkeypatch):
    call, message = CASES[name]
    monkeypatch.setattr("os.getpid", lambda: 1)
    monkeypatch.setattr("platform.node", lambda: "a.machine")
    message = message.replace("PARTIAL", "FOLDER/x/.plan.json.a-machine.1.partial").replace("FOLDER", str(tmp_path))
    with pytest.raises((ValueError, OSError), match=r".") as error:
        call(tmp_path)
    assert str(error.value) == message


def test_a_missing_router_is_no_silent_dense_model(tmp_path):
    """A routed model whose config has lost `expert_layers` has no weights for the dense layers it now describes."""
    model = to_shrp(tiny_bert())
    model.convert_layers_([1])
    model.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    fields["expert_layers"] = []
    (tmp_path / "config.json").write_text(json.dumps(fields))
    message = (
        f"`{tmp_path}` does not fit its config: 10 encoder weights are missing, the first is "
        "`bert.encoder.layer.1.attention.output.LayerNorm.bias`. The files are damaged or were mixed: download or save them "
        "again."
    )
    with torch.random.fork_rng(), pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        OPEN(tmp_path)
