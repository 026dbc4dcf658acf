"""Exported files against the models they came from, in ONNX Runtime."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import BertTokenizer
from typer.testing import CliRunner

from shrp_hf import cli
from shrp_hf.models.modeling_shrp_bert import ShrpBertForSequenceClassification
from shrp_hf.onnx_export import export, export_onnx, load_for_export, onnx_session
from shrp_hf.onnx_export.parity import SENTENCES, Comparison
from shrp_hf.plan import KeepPlan
from shrp_hf.surgery import prune_heads, to_shrp
from tests.test_families import CASES, WITHOUT_EXPERTS, inputs, stock
from tests.tiny import tiny_bert, tiny_routed

HALF, HOLED = KeepPlan(((0, 3), (1,), (0, 2)), 4), KeepPlan(((0, 3), (), (1, 2)), 4)
NAMES = ("logits", "start_logits", "end_logits", "last_hidden_state", "pooler_output")


def built(family, head, kind, **fields):
    model = stock(family, head, torch.float32)
    if kind == "stock":
        return model
    if kind in ("half", "holed"):
        return prune_heads(model, HALF if kind == "half" else HOLED)
    model = to_shrp(model)
    model.convert_layers_([1, 2])
    if kind == "routed":
        return model.eval()
    kept = ((0, 1, 2, 3), (1,), (2,)) if kind == "one expert" else HALF.kept
    return prune_heads(model, KeepPlan(kept, 4)).eval()


def run_file(path, batch):
    session = onnx_session(path, num_threads=1)
    names = [node.name for node in session.get_inputs()]
    outputs = session.run(None, {name: batch[name].numpy() for name in names})
    return dict(zip([node.name for node in session.get_outputs()], outputs, strict=True))


def check(model, family, head, folder):
    path = export_onnx(model, None, folder)
    for padding in (None,) if family == "vit" else ("left", "right", None):
        batch = inputs(family, padding, torch.float32, head or "")
        if padding is None and family != "vit":
            batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        if "token_type_ids" not in batch:
            batch["token_type_ids"] = torch.zeros_like(batch.get("input_ids", torch.zeros(1)))
        found = run_file(path, batch)
        with torch.no_grad():
            wanted = {k: v for k, v in batch.items() if k != "token_type_ids" or family in ("bert", "electra")}
            expected = model(**wanted)
        mask = batch.get("attention_mask")
        assert set(found) == {name for name in NAMES if expected.get(name) is not None}
        for name, values in found.items():
            close = np.abs(values - expected[name].numpy())
            if mask is not None and values.shape[:2] == mask.shape and values.ndim == 3:
                close = close[mask.numpy().astype(bool)]
            assert close.max() <= 1e-5 * max(1, np.abs(expected[name].numpy()).max()), (name, padding)


KINDS = ["stock", "half", "holed", "routed", "one expert", "experts"]
QUICK = [("bert", "SequenceClassification", "holed"), ("bert", "", "routed"), ("roberta", "TokenClassification", "experts"),
         ("distilbert", "QuestionAnswering", "half"), ("vit", "ImageClassification", "half")]  # fmt: skip
ALL_KINDS = [
    (family, head, kind)
    for family, head in [*CASES, ("bert", ""), ("vit", "")]
    for kind in KINDS
    if (family, head, kind) not in QUICK and (KINDS.index(kind) < 3 or family not in WITHOUT_EXPERTS)
]


@pytest.mark.parametrize(("family", "head", "kind"), QUICK)
def test_file_equals_model(family, head, kind, tmp_path):
    check(built(family, head, kind), family, head, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "head", "kind"), ALL_KINDS)
def test_file_equals_model_of_every_family_head_and_kind(family, head, kind, tmp_path):
    check(built(family, head, kind), family, head, tmp_path)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A static classifier with its tokenizer, saved."""
    folder = tmp_path_factory.mktemp("static")
    words = sorted({word for sentence in SENTENCES for word in re.findall(r"\w+|[^\w\s]", sentence.lower())})
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    (folder / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    tokenizer = BertTokenizer(vocab=str(folder / "vocab.txt"))
    model = prune_heads(tiny_routed(2, vocab_size=len(vocabulary)), KeepPlan(((0, 1, 2, 3), (1,), (0, 2)), 4))
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


SERVE = """
import json, sys
import numpy as np, onnxruntime
from tokenizers import Tokenizer
folder, sentences = sys.argv[1], json.loads(sys.argv[2])
tokenizer = Tokenizer.from_file(folder + "/tokenizer.json")
tokenizer.enable_padding()
encoded = tokenizer.encode_batch(sentences)
session = onnxruntime.InferenceSession(folder + "/model.onnx")
columns = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
feed = {node.name: np.array([getattr(e, columns[node.name]) for e in encoded]) for node in session.get_inputs()}
print(json.dumps({"logits": session.run(["logits"], feed)[0].tolist(), "torch": "torch" in sys.modules}))
"""


def test_exported_file_classifies_without_torch(saved, tmp_path):
    result = CliRunner().invoke(cli.app, ["export", str(saved), "--output", str(tmp_path / "onnx")])
    assert result.exit_code == 0, result.output
    assert "equal decisions 1.000" in result.output
    command = [sys.executable, "-c", SERVE, str(tmp_path / "onnx"), json.dumps(SENTENCES)]
    served = json.loads(subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout)
    assert not served["torch"]
    model, tokenizer = load_for_export(str(saved))
    assert isinstance(model, ShrpBertForSequenceClassification)
    with torch.no_grad():
        expected = model(**tokenizer(list(SENTENCES), padding=True, return_tensors="pt")).logits
    np.testing.assert_allclose(served["logits"], expected.numpy(), rtol=0, atol=1e-5)


def test_int8_is_written_with_its_agreement_and_refused_below_what_is_asked(saved, tmp_path, monkeypatch):
    model, tokenizer = load_for_export(str(saved))
    path = export_onnx(model, tokenizer, tmp_path, int8=True, min_agreement=0.5)
    record = json.loads((tmp_path / "onnx.json").read_text(encoding="utf-8"))
    assert record["int8"]
    assert record["sentences"] == len(SENTENCES)
    batch = tokenizer(list(SENTENCES), padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = model(**batch).logits.numpy().argmax(-1)
    decided = run_file(path, batch)["logits"].argmax(-1)
    assert decided.tolist() == expected.tolist()
    assert record["agreement_of_decisions"] == 1.0

    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    monkeypatch.setattr(Comparison, "agreement", lambda self, decides: 0.4375)
    message = (
        "In int8 the file agrees with `model` in 0.438 (equal decisions), less than `min_agreement=0.5`: nothing was "
        "written. Export without int8, or lower `min_agreement` if your own test set allows it."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        export_onnx(model, tokenizer, tmp_path, int8=True, min_agreement=0.5)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_file_that_differs_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Comparison, "difference", 2e-3)
    with pytest.raises(ValueError, match=r"^The exported file differs from `model` by 2\.0e-03 of its largest output"):
        export_onnx(tiny_bert(), None, tmp_path)
    assert not list(tmp_path.iterdir())


def test_comparison_by_hand():
    expected = [[np.array([[1.0, 2.0], [4.0, 3.0]])]]
    same, other = np.array([[1.0, 2.0], [4.0, 3.0]]), np.array([[1.0, 2.0], [3.0, 3.2]])
    assert Comparison(expected, [[same]], [None]).difference == 0
    compared = Comparison(expected, [[other]], [None])
    assert compared.difference == pytest.approx(1 / 4)
    assert compared.agreement(decides=True) == 0.5
    cosines = [1, (4 * 3 + 3 * 3.2) / (5 * np.hypot(3, 3.2))]
    assert compared.agreement(decides=False) == pytest.approx(np.mean(cosines))
    assert Comparison(expected, [[np.full((2, 2), np.nan)]], [None]).difference == float("inf")
    padded = [[np.array([[[1.0], [9.0]]])]]
    assert Comparison(padded, [[np.array([[[1.0], [5.0]]])]], [np.array([[1, 0]])]).difference == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_agreement": 1.5}, "`min_agreement` must be between 0 and 1, got 1.5."),
        ({"sentences": []}, "`sentences` must hold at least one sentence, got none."),
    ],
)
def test_bad_arguments_are_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        export_onnx(tiny_bert(), None, tmp_path, **options)


def test_torch_that_is_too_old_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(export.torch, "__version__", "2.9.1")
    message = "Export needs torch 2.11 or newer, and this is torch 2.9.1: upgrade torch."
    with pytest.raises(ImportError, match=f"^{re.escape(message)}$"):
        export_onnx(tiny_bert(), None, tmp_path)


def test_model_too_large_for_one_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "MAX_BYTES", 1000)
    with pytest.raises(ValueError, match="GB of float32 weights, and one ONNX file holds 2 GB: prune it first"):
        export_onnx(tiny_bert(), None, tmp_path)


def test_other_formats_are_refused(saved, tmp_path):
    result = CliRunner().invoke(cli.app, ["export", str(saved), "--format", "gguf", "--output", str(tmp_path)])
    assert str(result.exception) == '`format` must be "onnx", got \'gguf\'.'
