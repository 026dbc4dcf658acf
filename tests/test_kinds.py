"""Every kind of task through the commands: pruned, compressed, exported, and opened again where shrp_hf is not installed."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoTokenizer
from typer.testing import CliRunner

from shrp_hf import cli
from shrp_hf.checkpoints import open_tokenizer
from shrp_hf.measuring import flop_table
from shrp_hf.publishing.report import predict_on
from shrp_hf.tasks import Reading, load_fine_tuned, load_task
from shrp_hf.workflows.compare import read_cells
from shrp_hf.workflows.compress import Compression
from shrp_hf.workflows.compress import run as compress_run
from shrp_hf.workflows.train import REOPENED
from tests.task_kinds import KINDS, TAGS, make
from tests.test_compress import flop_time
from tests.test_pipelines import NOT_INSTALLED
from tests.tiny import assert_near

AUTO = {"tokens": AutoModelForTokenClassification, "embeddings": AutoModel}
HEADLINES = {"tokens": "entity_f1", "ranking": "map", "embeddings": "ndcg@10", "multilabel": "f1_micro"}
TEXTS = ["ann is the story of rome", "a long film"]
OPENED_ELSEWHERE = """
import json
from transformers import pipeline
from sentence_transformers import CrossEncoder, SentenceTransformer
folders, texts = json.load(open("given.json"))
trust = {"trust_remote_code": True, "device": "cpu"}
encoder = SentenceTransformer(folders["embeddings"], **trust)
found = {"embeddings": encoder.encode(texts, prompt_name="query").tolist()}
found["kept"] = [encoder.prompts["query"], encoder.max_seq_length, [type(module).__name__ for module in encoder]]
found["ranking"] = CrossEncoder(folders["ranking"], **trust).predict([texts]).tolist()
found["tokens"] = [word["entity"] for word in pipeline("token-classification", folders["tokens"], **trust)(texts[0])]
found["multilabel"] = pipeline("text-classification", folders["multilabel"], **trust)(texts[0], top_k=None)
assert "shrp_hf" not in sys.modules
json.dump(found, open("found.json", "w"), default=float)
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return {kind: make(kind, tmp_path_factory.mktemp(kind)) for kind in KINDS}


@pytest.fixture(scope="module")
def compressed(made, tmp_path_factory):
    """A compressed model of every kind, by the command; a clock that counts FLOPs."""
    root, folders = tmp_path_factory.mktemp("compressed"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(Compression.__init__.__kwdefaults__, "measure", flop_time)
        patch.setattr(compress_run, "problem_when_reopened", lambda *args: "")
        patch.setattr(compress_run, "latency_table", flop_table)
        patch.setattr("shrp_hf.workflows.compress.verdict.NUM_RESAMPLES", 20)
        for kind in KINDS:
            words = ["--speedup", "1.5", "--structures", "thin", "--max-trials", "1", "--force", "--recovery-epochs", "2"]
            words += ["--batch-size", "8", "--max-length", "24", "--shape", "2x16", "--output", str(root / kind)]
            result = run("compress", made[kind].model, *made[kind].options, *words)
            assert result.exit_code in (0, 3), (kind, result.output, result.exception)
            folders[kind] = root / kind
    return folders


def run(*words):
    return CliRunner().invoke(cli.app, list(map(str, words)))


def task_of(made, model=None):
    options = dict(zip(made.options[::2], made.options[1::2], strict=True))
    reading = Reading(task=options.get("--task"), corpus=options.get("--corpus"))
    return load_task(options.get("--dataset", ""), reading=reading)


@pytest.mark.parametrize("kind", KINDS)
def test_prune_export_and_reload(kind, made, tmp_path):
    words = [
        "--keep",
        "0.5",
        "--recovery-epochs",
        "1",
        "--batch-size",
        "8",
        "--max-length",
        "24",
        "--output",
        tmp_path / "out",
    ]
    result = run("prune", made[kind].model, *made[kind].options, *words)
    assert result.exit_code == 0, (result.output, result.exception)
    assert HEADLINES[kind] in result.output
    model = AUTO.get(kind, AutoModelForSequenceClassification).from_pretrained(tmp_path / "out")
    assert sum(map(len, model.config.kept_heads)) == 6
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert f"| {HEADLINES[kind]} |" in card
    assert ("SentenceTransformer(" in card) == (kind == "embeddings")
    graph = () if kind == "tokens" else ("--graph", "portable" if kind == "embeddings" else "fused")  # one of them: both
    result = run("export", tmp_path / "out", *made[kind].options, *graph, "--output", tmp_path / "onnx")
    assert result.exit_code == 0, (result.output, result.exception)
    record = json.loads((tmp_path / "onnx" / "onnx.json").read_text(encoding="utf-8"))
    assert record["compared_on"].endswith("were given")
    assert record["outputs"][0] == ("sentence_embedding" if kind == "embeddings" else "logits")


@pytest.mark.parametrize("kind", KINDS)
def test_compress_writes_a_model_of_the_kind(kind, made, compressed):
    folder = compressed[kind]
    summary = json.loads((folder / "compress.json").read_text(encoding="utf-8"))
    assert summary["headline"] == HEADLINES[kind]
    assert summary["trials"][0]["structure"] == "thin"
    low, high = summary["reported"]["result_interval"]
    assert low <= summary["reported"]["result"] <= high
    # What stands in the report is what the model in the folder reaches.
    task = task_of(made[kind])
    dense = load_fine_tuned(str(made[kind].model), task)
    model = load_fine_tuned(str(folder / "model"), task)
    tokenizer = open_tokenizer(str(folder / "model"), model)
    data = task.tokenize(tokenizer, 24, dense)
    found = task.compute_metrics(predict_on(model, data["test"], tokenizer))
    assert found[HEADLINES[kind]] == pytest.approx(summary["reported"]["result"], abs=1e-9)
    held_out = task.compute_metrics(predict_on(model, data["validation"], tokenizer))
    assert held_out[task.chosen_by] == pytest.approx(summary["trials"][0]["quality"], abs=1e-9)


def test_what_was_compressed_opens_and_answers_without_shrp_hf(compressed, tmp_path):
    pytest.importorskip("sentence_transformers")
    folders = {kind: str(folder / "model") for kind, folder in compressed.items()}
    (tmp_path / "given.json").write_text(json.dumps([folders, TEXTS]), encoding="utf-8")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", NOT_INSTALLED + OPENED_ELSEWHERE]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))
    assert found["kept"] == ["film ", 24, ["Transformer", "Pooling", "Normalize"]]
    assert {*found["tokens"]} <= {*TAGS}
    assert {entry["label"] for entry in found["multilabel"]} == {"love", "war"}
    tokenizer = AutoTokenizer.from_pretrained(folders["embeddings"])
    with torch.no_grad():
        batch = tokenizer([f"film {text}" for text in TEXTS], padding=True, return_tensors="pt")
        states = AutoModel.from_pretrained(folders["embeddings"])(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1)
        vectors = torch.nn.functional.normalize((states * mask).sum(dim=1) / mask.sum(dim=1), dim=-1)
        pair = tokenizer(*[[text] for text in TEXTS], return_tensors="pt")
        score = AutoModelForSequenceClassification.from_pretrained(folders["ranking"])(**pair).logits.sigmoid()
    assert_near(np.array(found["embeddings"]), vectors)
    assert_near(np.array(found["ranking"]), score[0])


@pytest.mark.parametrize("kind", KINDS)
def test_compare_sets_structures_side_by_side(kind, made, tmp_path):
    words = ["--selectors", "his", "--keep", "0.5", "--truncate", "1", "--thin-keep", "0.5", "--seeds", "0", "--no-speed"]
    words += ["--recovery-epochs", "0", "--max-length", "24", "--without-random", "--force", "--output", tmp_path / "out"]
    result = run("compare", made[kind].model, *made[kind].options, *words)
    assert result.exit_code == 0, (result.output, result.exception)
    table = (tmp_path / "out" / "table.md").read_text(encoding="utf-8")
    assert f"{HEADLINES[kind]} (reported)" in table
    cells = {cell["method"]: cell for cell in read_cells(tmp_path / "out")}
    assert {*cells} == {"dense", "his", "truncate", "thin"}
    task = task_of(made[kind])
    assert cells["dense"]["rows"] == task.num_reported
    assert cells["dense"]["agreement"] == 1
    assert next(iter(cells["his"]["held_out"])) == task.chosen_by


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tokens", "embeddings"])
def test_train_converts_to_experts(kind, made, tmp_path):
    words = ["--dense-epochs", "1" if kind == "tokens" else "0", "--num-expert-layers", "1", "--recovery-epochs", "1"]
    words += ["--batch-size", "8", "--max-length", "24", "--output", tmp_path / "out"]
    result = run("train", made[kind].model, *made[kind].options, *words)
    assert result.exit_code == 0, (result.output, result.exception)
    for name in ("dense", "converted", "static"):
        assert AUTO[kind].from_pretrained(tmp_path / "out" / name).config.num_hidden_layers == 3
        assert (tmp_path / "out" / name / "modules.json").exists() == (kind == "embeddings")
    report = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert REOPENED in report
    assert f"static: {HEADLINES[kind]}" in report


def test_embeddings_of_texts_alone_are_judged_by_the_dense_model(made, tmp_path):
    corpus = tmp_path / "texts.txt"
    corpus.write_text("\n".join(f"the story of ann and war {i}" for i in range(60)), encoding="utf-8")
    words = ["--keep", "0.9", "--max-length", "24", "--output", tmp_path / "out"]
    result = run("prune", made["embeddings"].model, "--task", "embeddings", "--corpus", corpus, *words)
    assert result.exit_code == 0, (result.output, result.exception)
    assert "unpruned: agreement 1.0000, cosine 1.0000" in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
