"""What an earlier version saved loads, and answers as it did when it was saved."""

import json

import pytest
import torch
from transformers import AutoModelForImageClassification, AutoModelForMaskedLM, AutoModelForSequenceClassification

import shrp_hf
from shrp_hf import Budget, HiesSelector, KeepPlan
from shrp_hf.models.configuration_shrp import FORMAT_VERSION
from shrp_hf.scoring import HeadStats, collect_head_stats
from tests.golden.make import HERE, MADE, STOCK, batches, inputs, measured
from tests.tiny import assert_near

VERSIONS = [f"v{version}" for version in range(1, FORMAT_VERSION + 1)]
ANSWERS = {version: json.loads((HERE / version / "answers.json").read_text(encoding="utf-8")) for version in VERSIONS}
MODELS = [(version, name) for version, answers in ANSWERS.items() for name in answers if name != "scores"]


def auto_class(name):
    for head, door in (("masked-lm", AutoModelForMaskedLM), ("vit", AutoModelForImageClassification)):
        if head in name:
            return door
    return AutoModelForSequenceClassification


def close(ours, theirs):
    """`theirs` were computed in float32, on another machine; `ours` in float64."""
    assert_near(theirs, ours)


def in_double(family):
    return {name: values.double() if values.is_floating_point() else values for name, values in inputs(family).items()}


@pytest.mark.parametrize(("version", "name"), MODELS)
def test_model_of_an_earlier_version_answers_as_it_did(version, name):
    answer = ANSWERS[version][name]
    family, _, kind = name.rpartition("-")
    model, info = auto_class(name).from_pretrained(HERE / version / name, output_loading_info=True)
    assert type(model).__name__ == answer["class"]
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        close(model.double()(**in_double(family)).logits, answer["logits"])
    assert {str(layer): counts for layer, counts in model.usage().items()} == answer["usage"]
    assert model.config.format_version == int(version.removeprefix("v"))
    if kind in ("dense", "pruned", "silent", "thin", "bare"):
        assert (model.config.kept_heads is None) is (kind == "dense")
        stock = shrp_hf.to_stock(model)
        assert type(stock).__name__ == STOCK[family][0]
        with torch.no_grad():
            close(stock.double()(**in_double(family)).logits, answer["logits"])


@pytest.mark.parametrize("version", VERSIONS)
def test_scores_and_plan_of_an_earlier_version_are_read_and_measured_again(version):
    folder, answer = HERE / version, ANSWERS[version]["scores"]
    model = shrp_hf.ShrpBertForSequenceClassification.from_pretrained(folder / "bert-dense")
    stats = HeadStats.load(folder / "scores.safetensors")
    today = measured(collect_head_stats(model.double(), batches(), stats.request))
    for name, value in measured(stats).items():
        torch.testing.assert_close(value, torch.tensor(answer[name], dtype=torch.float64), rtol=0, atol=1e-12)
        close(today[name], answer[name])
    plan = KeepPlan.from_json(folder / "plan.json")
    chosen = HiesSelector(budget=Budget.heads(4)).select(model, stats=stats)
    assert chosen.with_neurons(plan.neurons, plan.num_neurons) == plan
    assert json.loads(plan.to_json()) == json.loads((folder / "plan.json").read_text(encoding="utf-8"))


def test_golden_files_are_small_and_complete():
    sizes = [path.stat().st_size for path in HERE.glob("v*/**/*") if path.is_file()]
    assert sum(sizes) < 650_000
    kinds = {name for _, name in MODELS}
    for family in STOCK:
        found = {f"{family}-{kind}" for kind in ("dense", "pruned", "silent", "thin", "bare")}
        assert found <= kinds or family == "bert-masked-lm"
    for family in ("bert", "roberta"):
        assert {f"{family}-{kind}" for kind in ("routed", "pending", "static1", "static2")} <= kinds
    assert {(version, name) for version, name in MODELS if version == "v2"} == {("v2", f"{f}-{k}") for f, k in MADE}
