"""The record beside a model, and the card that says what is in it and nothing else."""

import json
import math
import re
from dataclasses import asdict, fields, replace
from types import SimpleNamespace

import numpy as np
import pytest
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from scipy import stats
from typer.testing import CliRunner

from shrp_hf import KeepPlan, cli
from shrp_hf.measuring import ModelReport, Timing, accuracy_interval, count_flops, count_parameters
from shrp_hf.pruning import prune_heads
from shrp_hf.publishing.card import CITATIONS, METHODS, write_card
from shrp_hf.publishing.record import (
    RECORD_NAME,
    Measured,
    Rows,
    RunRecord,
    Score,
    expert_choice,
    kept_heads,
    origin,
    source_name,
)
from shrp_hf.selectors import SELECTORS
from shrp_hf.training.recipes import Recipe
from tests.tiny import tiny_bert, tiny_routed

KEPT = ((0, 1, 2, 3), (2,), (0, 3))
ENVIRONMENT = {"machine": "2 x Some CPU", "torch": "2.13.0", "date": "2026-11-25"}
OPTIONAL = {"task", "reported", "license", "training", "calibration"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A static model with its code, and its record, measured by hand."""
    routed = tiny_routed(2)
    static = prune_heads(routed, KeepPlan(KEPT, 4))
    path = tmp_path_factory.mktemp("model")
    static.save_pretrained(path)
    seconds = {"dense": ((0.4, 0.4), (0.4, 0.4)), "static": ((0.1, 0.1, 0.1), (0.1, 0.1, 0.3))}
    rows = [
        ModelReport(name, count_parameters(model), count_flops(model, 1, 8), Timing(name, 1, 8, "cpu", 2, seconds[name]))
        for name, model in (("dense", routed), ("static", static))
    ]
    scores = {"dense": 90, "static": 84}
    record = RunRecord(
        method="shrp",
        base_model="org/bert",
        auto_class="AutoModelForSequenceClassification",
        kept=KeepPlan(KEPT, 4),
        expert_layers=(1, 2),
        measured=tuple(
            Measured.of(row, rows[0], [Score.of("accuracy", scores[row.name] / 100, 100), Score.of("f1", 0.5, 100)])
            for row in rows
        ),
        options={"keep": 1},
        seeds=(3,),
        task="sst2",
        reported="directory SST-2, test",
        license="mit",
        training=Rows(64, "training rows"),
        calibration=Rows(16, "rows held out"),
        shape=(1, 8),
        command="shrp-hf train x --dataset sst2",
        environment=ENVIRONMENT,
    )
    return path, record


@pytest.fixture
def folder(made):
    return made[0]


@pytest.fixture
def record(made):
    return made[1]


def text_of(folder, record):
    return write_card(folder, record).read_text(encoding="utf-8")


def test_record_is_read_as_written(record):
    assert RunRecord.from_json(record.to_json()) == record
    assert record.model.speed.ratio == 4.0
    assert record.model.scores[0].interval == accuracy_interval(84, 100)
    assert record.model.scores[1].interval is None
    assert record.kept == KeepPlan(KEPT, 4)


def test_card_loads_and_its_model_index_survives(folder, record):
    write_card(folder, record)
    card = ModelCard.load(folder / "README.md")
    name, results = model_index_to_eval_results(card.data.to_dict()["model-index"])
    assert name == "bert-sst2-shrp"
    assert results == card.data.eval_results
    assert model_index_to_eval_results(eval_results_to_model_index(name, results)) == (name, results)
    assert [(r.metric_type, r.metric_value) for r in results] == [("accuracy", 0.84), ("f1", 0.5)]
    assert {r.metric_args["rows"] for r in results} == {100}
    assert results[0].metric_args["interval_95"] == list(accuracy_interval(84, 100))
    assert "interval_95" not in results[1].metric_args
    assert (results[0].dataset_type, results[0].dataset_split) == ("sst2", "directory SST-2, test")
    assert (card.data.base_model, card.data.pipeline_tag) == ("org/bert", "text-classification")
    assert card.data.license == "mit"


def test_card_says_what_the_record_says(folder, record):
    text = text_of(folder, record)
    low, high = accuracy_interval(84, 100)
    parameters = record.model.parameters
    gone = parameters.reduction_from(record.baseline.parameters)
    said = [
        f"0.8400 (95%: {low:.4f} to {high:.4f}; 84 of 100)",
        f"{parameters.encoder:,} ({-gone['encoder']:+.1%})",
        f"{parameters.encoder_and_pooler:,} ({-gone['encoder_and_pooler']:+.1%})",
        f"{parameters.whole:,} ({-gone['whole']:+.1%})",
        "10.0 sequences/s (4.00x)",
        "2 x Some CPU, device cpu, 2 CPU threads, 2 rounds",
        "| 1 | expert layer | 1 of 4 | 2 |",
        "| 0 | ordinary | 4 of 4 | all |",
        "Trained on: 64 training rows",
        "Heads chosen on (calibration): 16 rows held out",
        "shrp-hf train x --dataset sst2",
        '`{"keep": 1}`',
        "torch 2.13.0, date 2026-11-25",
        "2512.20635",
        "One seed (3)",
        "Accuracy is 0.0600 below that of the model it is compared with; the intervals overlap",
        'pipeline("text-classification", model="PATH_OR_REPO", trust_remote_code=True)',
    ]
    assert [words for words in said if words not in text] == []


def test_what_is_not_in_the_record_is_not_in_the_card(folder, record):
    alone = replace(record.model, scores=(), flops=None, speed=None)
    bare = replace(record, measured=(alone,), options={}, seeds=(), command="", environment={}, **dict.fromkeys(OPTIONAL))
    text = text_of(folder, bare)
    claims = "accuracy % sequences/s G) rows Seeds seed calibration bash Options torch CPU".split()
    assert [word for word in claims if word in text] == []
    assert "Its quality was not measured." in text
    card = ModelCard.load(folder / "README.md")
    assert "model-index" not in card.data.to_dict()
    assert RunRecord.from_json(bare.to_json()) == bare


def test_baseline_without_scores_is_said(folder, record):
    text = text_of(folder, replace(record, measured=(replace(record.baseline, scores=()), record.model)))
    assert "| accuracy | not measured | 0.8400" in text
    assert "compared with" not in text


def test_directory_is_no_base_model_of_the_hub(folder, record, tmp_path):
    named = replace(record, base_model=source_name(str(tmp_path)))
    assert named.base_model.startswith("directory ")
    assert str(tmp_path) not in text_of(folder, named)
    assert "base_model" not in ModelCard.load(folder / "README.md").data.to_dict()
    assert source_name("org/bert") == "org/bert"


@pytest.mark.parametrize(
    ("text", "license"),
    [("---\nlicense: mit\n---\n", "mit"), ("# no license\n", None), ("---\n: [\n---\n", None), (None, None)],
    ids=["named", "not named", "damaged", "no card"],
)
def test_license_is_that_of_the_base_model(text, license, tmp_path):
    if text is not None:
        (tmp_path / "README.md").write_text(text, encoding="utf-8")
    assert origin(str(tmp_path)) == {"base_model": source_name(str(tmp_path)), "license": license}
    assert origin("org/unreachable") == {"base_model": "org/unreachable", "license": None}


def test_card_of_an_encoder_for_embeddings(folder, record):
    (folder / "modules.json").write_text("[]", encoding="utf-8")
    try:
        text = text_of(folder, replace(record, auto_class="AutoModel"))
    finally:
        (folder / "modules.json").unlink()
    assert 'SentenceTransformer("PATH_OR_REPO", trust_remote_code=True)' in text
    assert "pipeline_tag: sentence-similarity" in text


@pytest.mark.parametrize(
    ("auto_class", "call"),
    [
        ("AutoModelForMultipleChoice", "AutoModelForMultipleChoice.from_pretrained("),
        ("AutoModelForQuestionAnswering", "AutoModelForQuestionAnswering.from_pretrained("),
        ("AutoModelForMaskedLM", '"fill-mask"'),
    ],
)
def test_without_code_only_shrp_hf_opens_it(auto_class, call, folder, record, tmp_path):
    prune_heads(tiny_routed(2), KeepPlan(KEPT, 4)).save_pretrained(tmp_path, with_code=False)
    text = text_of(tmp_path, replace(record, auto_class=auto_class))
    assert call in text
    assert "import shrp_hf" in text
    assert "trust_remote_code=True" not in text


def test_every_selector_has_its_sentence_and_every_paper_its_citation(folder, record):
    structures = {"shrp", "shrp-without-routers", "thin", "first-layers", "spread-layers"}
    assert set(SELECTORS) | structures == set(METHODS)
    assert set(CITATIONS) == {"shrp", "shrp-without-routers", "usage", "hies", "cahp", "cahp-direct", "his"}
    for method in METHODS:
        text = text_of(folder, replace(record, method=method))
        assert METHODS[method] in text
        assert ("## Citation" in text) == (method in CITATIONS)


@pytest.mark.parametrize(
    ("selector", "method", "calibration"),
    [
        ("usage", "shrp", Rows(50, "rows held out of the training set")),
        ("his", "shrp-without-routers", Rows(1024, "training rows of moods")),
        ("random", "shrp-without-routers", None),
    ],
)
def test_record_tells_how_experts_were_chosen(selector, method, calibration):
    task = SimpleNamespace(name="moods", train=range(2000), validation=range(50))
    assert expert_choice(Recipe("x", expert_selector=selector), task) == {"method": method, "calibration": calibration}


def test_command_writes_it_anew(folder, record):
    expected = text_of(folder, record)
    (folder / "README.md").write_text("mine", encoding="utf-8")
    result = CliRunner().invoke(cli.app, ["card", str(folder)])
    assert result.exit_code == 0, result.output
    assert (folder / "README.md").read_text(encoding="utf-8") == expected


def test_record_of_another_model_is_refused(folder, record, tmp_path):
    tiny_bert().save_pretrained(tmp_path)
    record.to_json(tmp_path / RECORD_NAME)
    with pytest.raises(ValueError, match=r"^The record is of another model: it keeps \(\(0, 1, 2, 3\), \(2,\), \(0, 3\)\)"):
        write_card(tmp_path)
    assert not (tmp_path / "README.md").exists()


def test_model_without_a_record_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must hold a saved model, but .* has no config.json"):
        write_card(tmp_path)
    tiny_bert().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds no shrp_record.json, and a card says only what is recorded"):
        write_card(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"seeds": (1.5,)}, "`RunRecord.seeds` has the wrong type", id="type"),
        pytest.param({"version": 2}, "`version` is 2, but this code reads up to 1: update shrp_hf.", id="version"),
        pytest.param({"measured": ()}, "`measured` must hold at least the model itself, got none.", id="nothing"),
        pytest.param({"expert_layers": (3,)}, "`expert_layers` names [3], but the layers are 0 to 2.", id="layer"),
        pytest.param({"task": None}, "`task` must name what the scores were measured on, got None.", id="task"),
    ],
)
def test_record_checks_itself(change, message, record):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        replace(record, **change)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        pytest.param({"value": 0.5, "correct": 4}, "`accuracy=0.5` is not 4 of 10.", id="count"),
        pytest.param({"value": 0.5, "interval": (0.6, 0.7)}, "`interval` of accuracy must hold its value 0.5", id="interval"),
        pytest.param({"value": "0.5"}, "`Score.value` has the wrong type", id="type"),
    ],
)
def test_score_checks_itself(values, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        Score("accuracy", total=10, **values)


@pytest.mark.parametrize("damage", ["truncated", "list", "missing", "surplus", "nested"])
def test_damaged_record_is_refused_by_name(damage, record):
    values = json.loads(record.to_json())
    texts = {
        "truncated": record.to_json()[:-9],
        "list": "[]",
        "missing": json.dumps({key: value for key, value in values.items() if key != "kept"}),
        "surplus": json.dumps(values | {"claim": "best"}),
        "nested": json.dumps(values | {"calibration": {"count": "many", "source": "x"}}),
    }
    with pytest.raises(ValueError, match=r"^Not a run record: "):
        RunRecord.from_json(texts[damage])


def test_intervals_of_correlations_are_those_of_scipy():
    generator = np.random.default_rng(0)
    x = generator.normal(size=50)
    y = x + generator.normal(size=50)
    pearson = stats.pearsonr(x, y)
    score = Score.of("pearson", pearson.statistic, 50)
    assert score.interval == pytest.approx(tuple(pearson.confidence_interval(0.95)), abs=1e-12)
    low, high = Score.of("spearmanr", pearson.statistic, 50).interval
    assert low < score.interval[0] < score.interval[1] < high
    assert Score.of("spearmanr", 1.0, 50).interval is None


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_scores_of_none_and_all_correct_have_an_interval(share):
    for total in range(1, 3001, 7):
        low, high = Score.of("accuracy", share, total).interval
        assert low <= share <= high


def test_undefined_correlation_is_reported_as_such(folder, record):
    score = Score.of("pearson", math.nan, 100)
    assert (score.value, score.interval) == (None, None)
    measured = tuple(replace(m, scores=(score,)) for m in record.measured)
    undefined = replace(record, measured=measured)
    assert RunRecord.from_json(undefined.to_json()) == undefined
    assert "NaN" not in undefined.to_json()
    text = text_of(folder, undefined)
    assert "| pearson | undefined: constant predictions | undefined: constant predictions |" in text
    assert "The models are not compared: pearson is undefined for a model whose predictions are constant" in text
    assert ModelCard.load(folder / "README.md").data.eval_results is None


def test_stock_model_keeps_all():
    assert kept_heads(tiny_bert().config) == KeepPlan.full(3, 4)


def test_every_field_is_written(record):
    assert set(asdict(record)) == {entry.name for entry in fields(RunRecord)} == set(json.loads(record.to_json()))
