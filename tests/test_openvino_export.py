"""OpenVINO says what PyTorch says; what rounds agrees, and a process without torch answers with it."""

import copy
import importlib.util
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from shrp_hf import cli
from shrp_hf.export import ExportOptions, ExportRows, export_model, load_for_export, openvino_session
from shrp_hf.export.sentences import SENTENCES
from tests.test_families import inputs
from tests.test_onnx_export import _traced_before, built, small, write_classifier, written_graphs  # noqa: F401, write_classifier
from tests.tiny import assert_near, tiny_bert

pytestmark = pytest.mark.usefixtures("openvino_unrestricted")
needs_openvino = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("openvino", "nncf")),
    reason="the extra `openvino` is not installed",
)
EXACT = ExportOptions("openvino")


@needs_openvino
@pytest.mark.parametrize(
    ("family", "head", "kind"),
    [
        ("bert", "MultipleChoice", "one expert"),
        pytest.param("bert", "", "routed", marks=pytest.mark.slow),
        ("distilbert", "QuestionAnswering", "thin"),
        pytest.param("modernbert", "SequenceClassification", "holed", marks=pytest.mark.slow),
        pytest.param("mpnet", "SequenceClassification", "holed", marks=pytest.mark.slow),
        pytest.param("nomicbert", "SequenceClassification", "half", marks=pytest.mark.slow),
        pytest.param("deberta", "SequenceClassification", "half", marks=pytest.mark.slow),
        pytest.param("vit", "ImageClassification", "holed", marks=pytest.mark.slow),
    ],
)
def test_file_equals_model(family, head, kind, tmp_path):
    model = built(family, head, kind)
    session = openvino_session(export_model(model, None, tmp_path, EXACT), num_threads=1)
    for padding in (None,) if family == "vit" else ("left", "right", None):
        feed = inputs(family, padding, torch.float32, head)
        if family != "vit":
            feed.setdefault("attention_mask", torch.ones_like(feed["input_ids"]))
        if "token_type_ids" in session.input_names:
            feed["token_type_ids"] = torch.zeros_like(feed["input_ids"])
        assert set(session.input_names) == set(feed)
        double = {name: value.double() if value.is_floating_point() else value for name, value in feed.items()}
        with torch.no_grad():
            expected = copy.deepcopy(model).double()(**double)
        names = json.loads((tmp_path / "openvino.json").read_text(encoding="utf-8"))["outputs"]
        for name, found in zip(names, session.run(names, {k: v.numpy() for k, v in feed.items()}), strict=True):
            assert_near(found, expected[name])


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A saved static classifier with a tokenizer, and a text file to calibrate on."""
    folder = tmp_path_factory.mktemp("classifier")
    (folder / "calibration.txt").write_text("\n".join(SENTENCES[::-1]), encoding="utf-8")
    return write_classifier(folder)


ALONE = """
import json, sys
import numpy as np, openvino
from tokenizers import Tokenizer
folder, texts = sys.argv[1], json.loads(sys.argv[2])
tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
tokenizer.enable_padding()
tokenizer.enable_truncation(64)
encoded = tokenizer.encode_batch(texts)
feed = {"input_ids": [e.ids for e in encoded], "attention_mask": [e.attention_mask for e in encoded],
        "token_type_ids": [e.type_ids for e in encoded]}
model = openvino.Core().compile_model(f"{folder}/model.xml", "CPU")
logits = model({port.get_any_name(): np.array(feed[port.get_any_name()]) for port in model.inputs})["logits"]
assert "torch" not in sys.modules and "transformers" not in sys.modules
print(json.dumps(logits.argmax(-1).tolist()))
"""


@needs_openvino
@pytest.mark.parametrize("precision", ["float16", "int8", "int8-static"])
@pytest.mark.usefixtures("traced_once")
def test_a_process_without_torch_classifies_as_the_model_does(precision, classifier, tmp_path):
    words = ["--format", "openvino", "--precision", precision, "--min-agreement", "0.7"]
    if precision == "int8-static":
        words += ["--calibration", str(classifier.with_name("calibration.txt"))]
    result = CliRunner().invoke(cli.app, ["export", str(classifier), "--output", str(tmp_path), *words])
    assert result.exit_code == 0, result.output
    assert "Written to" in result.output
    run = subprocess.run(
        [sys.executable, "-c", ALONE, str(tmp_path), json.dumps(SENTENCES)], capture_output=True, text=True, check=True
    )
    model, tokenizer = load_for_export(str(classifier))
    encoded = tokenizer(list(SENTENCES), padding=True, truncation=True, max_length=64, return_tensors="pt")
    with torch.no_grad():
        expected = model(**encoded).logits.argmax(-1).numpy()
    assert len(set(expected)) > 1
    assert (np.array(json.loads(run.stdout)) == expected).mean() >= 0.7
    record = json.loads((tmp_path / "openvino.json").read_text(encoding="utf-8"))
    assert record["precision"] == precision
    assert record["agreement"]["agreement"] >= 0.7
    assert record.get("calibrated_on") == ("24 texts" if precision == "int8-static" else None)
    assert record["float32"]["largest_difference"] <= record["float32"]["tolerance"]
    assert {"openvino", "nncf"} <= set(record["versions"])
    assert {"model.xml", "model.bin", "config.json", "tokenizer.json", "openvino.json"} <= {p.name for p in tmp_path.iterdir()}
    assert not list(tmp_path.glob(".*"))


@needs_openvino
@pytest.mark.usefixtures("_traced_before")
def test_rounded_files_are_small(tmp_path):
    sizes = {}
    for precision in ("float32", "float16", "int8"):
        path = export_model(small(), None, tmp_path / precision, ExportOptions("openvino", precision, min_agreement=0.0))
        sizes[precision] = path.with_suffix(".bin").stat().st_size
    assert sizes["float16"] < 0.6 * sizes["float32"]
    assert sizes["int8"] < 0.5 * sizes["float32"]


@needs_openvino
@pytest.mark.usefixtures("_traced_before")
def test_a_refused_export_leaves_the_old_file(tmp_path):
    export_model(small(), None, tmp_path, EXACT)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(
        RuntimeError, match=r"^The openvino file differs from PyTorch by .* a release of openvino that was not"
    ):
        export_model(small(seed=8), None, tmp_path, EXACT)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize("package", ["openvino", "nncf"])
def test_a_missing_extra_is_named(package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r"pip install 'shrp_hf\[openvino\]'"):
        export_model(tiny_bert(), None, tmp_path / "out", EXACT)
    assert not (tmp_path / "out").exists()


@needs_openvino
@pytest.mark.parametrize(
    ("precision", "rows", "message"),
    [
        ("int8-static", None, "Got 'int8-static' and 0 texts."),
        ("int8", ["No."], "Got 'int8' and 1 texts."),
    ],
)
def test_calibration_goes_with_static_int8(precision, rows, message, classifier, tmp_path):
    model, tokenizer = load_for_export(str(classifier))
    with pytest.raises(ValueError, match=f"^`calibration` and `precision='int8-static'` go together: .*{re.escape(message)}$"):
        export_model(model, tokenizer, tmp_path / "out", ExportOptions("openvino", precision), ExportRows(calibration=rows))
    assert not (tmp_path / "out").exists()


def test_an_empty_calibration_set_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^`calibration` must be a list of sentences, at least one, got \[\]\.$"):
        ExportRows(calibration=[])
    (tmp_path / "empty.txt").write_text("\n \n", encoding="utf-8")
    words = ["--format", "openvino", "--precision", "int8-static", "--calibration", str(tmp_path / "empty.txt")]
    result = CliRunner().invoke(cli.app, ["export", "nowhere", "--output", str(tmp_path / "out"), *words])
    assert str(result.exception) == f"`--calibration {tmp_path / 'empty.txt'}` holds no text."


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`path` must be a file of OpenVINO or a directory that holds `model.xml`"):
        openvino_session(tmp_path)
