"""ONNX Runtime says what PyTorch says, for every family, kind of model and task head; what does not is not published."""

import copy
import json
import math
import re
import shutil
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from transformers import AutoConfig, BertConfig, BertForMaskedLM, BertTokenizer
from typer.testing import CliRunner

from shrp_hf import KeepPlan, cli, prune_heads, to_shrp
from shrp_hf.export import (
    ExportOptions,
    ExportRows,
    QualityLoss,
    check,
    export_model,
    export_onnx,
    load_for_export,
    onnx_session,
    runtime,
)
from shrp_hf.export import onnx as export
from shrp_hf.export.embeddings import with_small_embeddings
from shrp_hf.export.graph import OUTPUTS
from shrp_hf.export.sentences import SENTENCES
from shrp_hf.numerics import ROUNDINGS
from tests.test_families import CASES, TABLE, inputs, stock
from tests.tiny import assert_near, randomize_, same_state, tiny_bert, tiny_routed

onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
WORDS = sorted({word for text in SENTENCES for word in text.lower().replace(".", " ").split() if word.isalpha()})
HALF, HOLED = KeepPlan(((0, 3), (1,), (0, 2)), 4), KeepPlan(((0, 3), (), (1, 2)), 4)
STATIC = KeepPlan(((0, 1, 2, 3), (1,), (2,)), 4)
THIN = KeepPlan(((0, 3), (), (0, 1, 2)), 4, (tuple(range(9)), (), (1,)), 64)
KINDS = ("stock", "half", "holed", "thin", "routed", "two of several", "one expert", "experts", "experts, holed")
QUICK = [
    ("bert", "MultipleChoice", "one expert"),
    ("bert", "", "routed"),
    ("roberta", "TokenClassification", "experts, holed"),
    ("distilbert", "QuestionAnswering", "half"),
    ("modernbert", "SequenceClassification", "holed"),
    ("distilbert", "", "thin"),
    ("vit", "", "thin"),
    ("mpnet", "SequenceClassification", "two of several"),
    ("deberta-v3", "SequenceClassification", "experts"),
    ("modernbert", "", "experts, holed"),
    ("vit", "ImageClassification", "experts"),
]
ALL = [(family, head, kind) for family, head in [*CASES, *((family, "") for family in TABLE)] for kind in KINDS]
PORTABLE = {("bert", "", "routed"), ("distilbert", "QuestionAnswering", "half")}
FUSED = ExportOptions(graph="fused")


def built(family, head, kind):
    model = stock(family, head, torch.float32)
    if kind == "stock":
        return model
    if kind in ("half", "holed", "thin"):
        return prune_heads(model, {"half": HALF, "holed": HOLED, "thin": THIN}[kind])
    model = to_shrp(model)
    if kind == "two of several":
        model.config.experts_per_sequence, model.config.router_pooling = 2, "cls"
    model.convert_layers_([1, 2])
    randomize_(model)
    if model.config.routed and kind in ("routed", "two of several"):
        return model.eval()
    kept = {"one expert": STATIC.kept, "experts": HALF.kept, "experts, holed": ((), (0,), (1, 2, 3))}[kind]
    return prune_heads(model, KeepPlan(kept, 4)).eval()


def assert_says_the_same(path, model, family, head, padding):
    feed = inputs(family, padding, torch.float32, head)
    session = onnx_session(path, num_threads=1)
    asked = {node.name for node in session.get_inputs()}
    if family != "vit":
        feed.setdefault("attention_mask", torch.ones_like(feed["input_ids"]))
    if "token_type_ids" in asked:
        feed["token_type_ids"] = (torch.arange(feed["input_ids"].shape[-1]) > 3).long().expand_as(feed["input_ids"])
    assert asked == set(feed)
    for rows in (slice(None), slice(1)):
        part = {name: tensor[rows] for name, tensor in feed.items()}
        with torch.no_grad():
            double = {k: v.double() if v.is_floating_point() else v for k, v in part.items()}
            expected = copy.deepcopy(model).double()(**double)
        names = [node.name for node in session.get_outputs()]
        assert names == [name for name in OUTPUTS if expected.get(name) is not None]
        for name, found in zip(names, session.run(names, {k: v.numpy() for k, v in part.items()}), strict=True):
            assert_near(found, expected[name])


@pytest.mark.parametrize(
    ("family", "head", "kind", "graph"),
    [
        pytest.param(*case, graph, marks=() if case in quick else pytest.mark.slow, id="-".join((*case, graph)))
        for graph, quick in (("fused", QUICK), ("portable", PORTABLE))
        for case in ALL
    ],
)
def test_file_equals_model(family, head, kind, graph, tmp_path):
    model = built(family, head, kind).train()
    before = copy.deepcopy(model)
    path = export_model(model, None, tmp_path, ExportOptions(graph=graph))
    assert model.training
    assert same_state(model, before)
    assert model.config._attn_implementation == before.config._attn_implementation
    if graph == "portable":
        assert runtime.own_operators(path) == []
    for padding in (None,) if family == "vit" else ("left", "right", None):
        assert_says_the_same(path, model.eval(), family, head, padding)


def small(**fields):
    """A static classifier: one ordinary layer and two expert layers."""
    return prune_heads(tiny_routed(2, **fields), STATIC)


@pytest.fixture(scope="session")
def written_graphs(tmp_path_factory):
    """The files of `small()`, exported once, by their operators."""
    folder = tmp_path_factory.mktemp("written")
    return {name: export_model(small(), None, folder / name, ExportOptions(graph=name)) for name in ("fused", "portable")}


@pytest.fixture
def written(written_graphs):
    """That with fused operators."""
    return written_graphs["fused"]


@pytest.fixture
def _traced_before(written_graphs, monkeypatch):
    """Takes the files of `small()` for those of whatever is exported."""
    monkeypatch.setattr(export, "write_graph", lambda *args: shutil.copy(written_graphs[args[4].operators], args[3]))


# --- the text side, and a process without torch ---


def write_classifier(folder):
    """Saves a static classifier that does not name one class for all built-in sentences, with a tokenizer that knows them.

    Its two highest logits are 0.16 apart or more in 17 of 24 sentences, where int8 moves a logit by 0.05 at most: seven of
    ten answers stay, whatever the kernel.
    """
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", ",", "!", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocab), encoding="utf-8")
    tokenizer = BertTokenizer(vocab=str(folder / "vocab.txt"))
    torch.manual_seed(0)
    model = small(vocab_size=len(vocab), max_position_embeddings=64)
    with torch.no_grad():  # around their mean, not all logits can name one class
        model.classifier.bias -= model(**tokenizer(list(SENTENCES), padding=True, return_tensors="pt")).logits.mean(dim=0)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    return write_classifier(tmp_path_factory.mktemp("classifier"))


ALONE = """
import json, sys
import numpy as np, onnxruntime
from tokenizers import Tokenizer
folder, texts = sys.argv[1], json.loads(sys.argv[2])
tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
tokenizer.enable_padding()
tokenizer.enable_truncation(64)
encoded = tokenizer.encode_batch(texts)
feed = {"input_ids": [e.ids for e in encoded], "attention_mask": [e.attention_mask for e in encoded],
        "token_type_ids": [e.type_ids for e in encoded]}
session = onnxruntime.InferenceSession(f"{folder}/model.onnx")
(logits,) = session.run(None, {i.name: np.array(feed[i.name]) for i in session.get_inputs()})
assert "torch" not in sys.modules and "transformers" not in sys.modules
id2label = json.load(open(f"{folder}/config.json"))["id2label"]
print(json.dumps([id2label[str(label)] for label in logits.argmax(-1).tolist()]))
"""


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.usefixtures("traced_once")
def test_a_process_without_torch_classifies_as_the_model_does(int8, classifier, tmp_path):
    words = ["export", str(classifier), "--output", str(tmp_path), *(["--int8", "--min-agreement", "0.7"] if int8 else [])]
    result = CliRunner().invoke(cli.app, words)
    assert result.exit_code == 0, result.output
    run = subprocess.run(
        [sys.executable, "-c", ALONE, str(tmp_path), json.dumps(SENTENCES)], capture_output=True, text=True, check=True
    )
    model, tokenizer = load_for_export(str(classifier))
    encoded = tokenizer(list(SENTENCES), padding=True, truncation=True, max_length=64, return_tensors="pt")
    with torch.no_grad():
        expected = [model.config.id2label[label] for label in model(**encoded).logits.argmax(-1).tolist()]
    assert len(set(expected)) > 1
    found = json.loads(run.stdout)
    record = json.loads((tmp_path / "onnx.json").read_text(encoding="utf-8"))
    if int8:
        assert np.mean([a == b for a, b in zip(found, expected, strict=True)]) >= 0.7
        assert record["agreement"]["agreement"] >= 0.7
    else:
        assert found == expected
    assert record["inputs"] == ["input_ids", "attention_mask", "token_type_ids"]
    assert record["precision"] == ("int8" if int8 else "float32")
    assert record["compared_on"] == f"{len(SENTENCES)} built-in sentences"
    assert record["float32"]["largest_difference"] <= record["float32"]["tolerance"] == ROUNDINGS * 2**-23
    assert {"torch", "onnxruntime", "transformers", "shrp_hf"} <= set(record["versions"])
    assert AutoConfig.from_pretrained(tmp_path).architectures == ["ShrpBertForSequenceClassification"]
    assert b"site-packages" not in (tmp_path / "model.onnx").read_bytes()  # nor any other path of this machine


def test_an_expert_layer_is_five_operators_and_residuals_stay_apart(written, tmp_path):
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "opened.onnx")
    onnxruntime.InferenceSession(written, options)
    nodes = Counter(node.op_type for node in onnx.load(tmp_path / "opened.onnx").graph.node)
    # three layers, two of them expert layers; embeddings, dense layer and residuals
    assert (nodes["Attention"], nodes["BiasGelu"], nodes["LayerNormalization"], nodes["Sum"]) == (3, 3, 5, 3)
    assert nodes["MatMul"] == 5
    assert not {"SkipLayerNormalization", "Transpose", "Reshape", "Expand", "Where", "Softmax"} & set(nodes)


# --- two graphs, and small embeddings ---


@pytest.mark.parametrize(("fused", "portable", "kept"), [(10.0, 9.0, "portable"), (10.0, 9.9, "fused"), (10.0, 11.0, "fused")])
@pytest.mark.usefixtures("_traced_before")
def test_the_graph_that_is_clearly_faster_here_is_kept(fused, portable, kept, tmp_path, monkeypatch):
    times = {"fused": fused, "portable": portable}
    monkeypatch.setattr(export, "time_in_turns", lambda paths, batches: {name: times[name] for name in paths})
    path = export_model(small(), None, tmp_path)
    record = json.loads(path.with_name("onnx.json").read_text(encoding="utf-8"))
    assert record["graph"] == {"kept": kept, "asked": "fastest", "milliseconds": times}
    assert (
        record["own_operators"] == runtime.own_operators(path) == ([] if kept == "portable" else ["com.microsoft::Attention"])
    )
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.onnx", "onnx.json"]


def test_files_are_timed_in_turns(written):
    found = runtime.time_in_turns({"a": written, "b": written}, check.make_batches(small(), None, ()))
    assert list(found) == ["a", "b"]
    assert min(found.values()) > 0


def test_a_family_without_fused_operators_has_one_graph(written_graphs, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "write_graph", lambda *args: shutil.copy(written_graphs["portable"], args[3]))
    record = json.loads(export_model(small(), None, tmp_path).with_name("onnx.json").read_text(encoding="utf-8"))
    assert record["graph"] == {"kept": "portable", "asked": "fastest", "milliseconds": {}}


@pytest.mark.parametrize(
    "options",
    [
        {"opset": 18},
        pytest.param({"opset": 23}, marks=pytest.mark.slow),
        {"precision": "int8", "min_agreement": 0.0},
    ],
)
def test_a_portable_file_has_standard_operators_of_its_opset(options, written_graphs, tmp_path, monkeypatch):
    if "opset" not in options:
        monkeypatch.setattr(export, "write_graph", lambda *args: shutil.copy(written_graphs["portable"], args[3]))
    path = export_model(small(), None, tmp_path, ExportOptions(graph="portable", **options))
    assert runtime.own_operators(path) == []
    assert {entry.version for entry in onnx.load(path).opset_import if not entry.domain} == {options.get("opset", 20)}


@pytest.mark.parametrize(("precision", "kind"), [("float16", "FLOAT16"), ("int8", "INT8")])
def test_word_embeddings_are_kept_small_and_read_row_by_row(precision, kind, tmp_path):
    """By each row's largest value, in int8; the decoder that they are tied to stays as it was."""
    model = tiny_bert(BertForMaskedLM)
    weight = model.get_input_embeddings().weight.detach().clone()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    rows = weight.half() if precision == "float16" else (127 * weight / weight.abs().amax(1, keepdim=True)).round()
    options = ExportOptions(graph="portable", embeddings=precision, min_agreement=0.0)
    path = export_model(model, None, tmp_path, options)
    tables = [t for t in onnx.load(path).graph.initializer if list(t.dims) == list(weight.shape)]
    assert [onnx.TensorProto.DataType.Name(t.data_type) for t in tables] == [kind]
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(tables[0]).astype(np.float64), rows.double().numpy())
    small_form, rounded = with_small_embeddings(model, precision)
    assert torch.equal(model.get_input_embeddings().weight, weight)
    batch = {name: torch.from_numpy(array) for name, array in check.make_batches(model, None, ())[0].items()}
    with torch.no_grad():
        assert_near(small_form(**batch).logits, rounded.double()(**batch).logits)
    assert json.loads(path.with_name("onnx.json").read_text(encoding="utf-8"))["embeddings"] == precision


def test_images_have_no_word_embeddings(tmp_path):
    with pytest.raises(ValueError, match="`embeddings` must be float32 for `ViTModel`, which reads no words, got 'int8'"):
        export_model(stock("vit", "", torch.float32), None, tmp_path, ExportOptions(embeddings="int8"))


# --- nothing is published that does not agree ---


@pytest.mark.usefixtures("_traced_before")
def test_a_file_that_differs_is_not_published(tmp_path):
    message = (
        r"^The onnx file differs from PyTorch by \d\.\d of the largest output, more than 1\.2e-04: nothing was published\. "
        r"Weights that are not finite, or a release of onnxruntime that was not tested, may cause this\.$"
    )
    with pytest.raises(RuntimeError, match=message):
        export_onnx(small(seed=8), None, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.usefixtures("_traced_before")
def test_an_int8_file_that_disagrees_is_not_published(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "agreement", lambda *args: ("equal classes", 0.8))
    message = (
        "The int8 file agrees with PyTorch on 0.800 (equal classes), less than `min_agreement=0.9`: nothing was published. "
        "Compare on sentences of your task (`texts`), lower `min_agreement`, or export in float32."
    )
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        export_onnx(small(), None, tmp_path, int8=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("_traced_before")
def test_a_refused_export_leaves_the_old_file(tmp_path):
    path = export_onnx(small(), None, tmp_path)
    before = path.read_bytes()
    with pytest.raises(RuntimeError, match="nothing was published"):
        export_onnx(small(seed=8), None, tmp_path)
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.onnx", "onnx.json"]


@pytest.mark.parametrize(
    ("after", "low", "force", "is_refused"),
    [
        (0.80, 0.01, False, True),
        (0.80, 0.01, True, False),
        (0.80, -0.01, False, False),  # chance may explain it
        (0.898, 0.001, False, False),  # less than 0.3 points
    ],
)
@pytest.mark.usefixtures("_traced_before")
def test_a_file_that_loses_quality_is_not_published(after, low, force, is_refused, tmp_path):
    seen = []

    def judge(ours, theirs):
        seen.append((ours.shape, theirs.shape))
        return QualityLoss("accuracy", 0.9, after, (low, 0.2), 24)

    def write():
        options = ExportOptions(precision="int8", graph="fused", min_agreement=0.0, force=force)
        return export_model(small(), None, tmp_path, options, ExportRows(judge=judge))

    if is_refused:
        message = (
            "The int8 file loses 10.00 points of accuracy on 24 held-out rows (95% interval 1.00 to 20.00): nothing was "
            "published. Export in another precision, or `force` it."
        )
        with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
            write()
        assert list(tmp_path.iterdir()) == []
    else:
        record = json.loads(write().with_name("onnx.json").read_text(encoding="utf-8"))
        assert record["quality"]["forced"] == force
    assert seen == [((24, 3), (24, 3))]


def logits(*rows):
    return [{"logits": np.array(rows, dtype=np.float32)}]


@pytest.mark.parametrize(
    ("head", "fields", "expected", "found", "mask", "share"),
    [
        pytest.param("SequenceClassification", {}, [[1, 2], [3, 0]], [[0, 1], [0, 1]], None, 0.5, id="classes"),
        pytest.param("TokenClassification", {}, [[[1, 2], [3, 0]]], [[[0, 1], [0, 1]]], [[1, 0]], 1.0, id="real tokens"),
        pytest.param("SequenceClassification", {"num_labels": 1}, [[0], [2]], [[0], [1]], None, 0.5, id="regression"),
        pytest.param(
            "SequenceClassification",
            {"problem_type": "multi_label_classification"},
            [[1, -2], [3, 1]],
            [[1, -2], [3, -1]],
            None,
            0.75,
            id="labels",
        ),
        # As many classes, or labels, as the batch has tokens.
        pytest.param("SequenceClassification", {}, [[1, 2], [3, 0]], [[0, 1], [0, 1]], [[1, 0], [1, 1]], 0.5, id="classes, 2"),
        pytest.param(
            "SequenceClassification",
            {"problem_type": "multi_label_classification"},
            [[1, -2], [3, 1]],
            [[1, -2], [3, -1]],
            [[1, 0], [1, 0]],
            0.75,
            id="labels, 2",
        ),
        pytest.param(
            "SequenceClassification",
            {"problem_type": "regression"},
            [[0, 5], [2, 9]],
            [[0, 5], [1, 9]],
            None,
            0.9,
            id="two numbers",
        ),
        pytest.param("MultipleChoice", {}, [[1, 2], [3, 0]], [[0, 1], [0, 1]], [[1, 0], [1, 1]], 0.5, id="choices"),
    ],
)
def test_agreement(head, fields, expected, found, mask, share):
    model = stock("bert", head) if head != "SequenceClassification" else tiny_bert(**fields)
    batches = [{} if mask is None else {"attention_mask": np.array(mask)}]
    assert check.agreement(model, batches, logits(*expected), logits(*found))[1] == pytest.approx(share)


def test_agreement_with_one_number_for_all_is_undefined():
    measured = check.agreement(tiny_bert(num_labels=1), [{}], logits([2], [2]), logits([2], [2]))
    assert math.isnan(measured[1])
    with pytest.raises(RuntimeError, match=r"^The agreement of the int8 file \(1 - error / variance\) is undefined: "):
        export._check_agreement(measured, ExportOptions(precision="int8"))


@pytest.mark.parametrize("num_labels", [2, 3, 4, 5, 6, 7, 8])
def test_int8_of_a_classifier_is_compared_whatever_its_number_of_classes(num_labels):
    """On batches in which some sentence has as many tokens as there are classes."""
    model = tiny_bert(num_labels=num_labels)
    batches = [batch for batch in check.make_batches(model, None, ())]
    batches += [{name: array[:1, :num_labels] for name, array in batch.items()} for batch in batches]
    answers = check.torch_outputs(model, ["logits"], batches)
    assert check.agreement(model, batches, answers, answers) == ("equal classes", 1.0)


def test_agreement_of_spans_and_vectors():
    batch = [{"attention_mask": np.array([[1, 1, 0]])}]
    spans = [{"start_logits": np.array([[0.0, 1, 9]]), "end_logits": np.array([[0.0, 1, 2]])}]
    other = [{"start_logits": np.array([[0.0, 2, 1]]), "end_logits": np.array([[3.0, 1, 2]])}]
    model = stock("bert", "QuestionAnswering")
    assert check.agreement(model, batch, spans, spans) == ("equal spans", 1.0)
    assert check.agreement(model, batch, spans, other) == ("equal spans", 0.0)
    vectors = [{"last_hidden_state": np.array([[[1.0, 0], [0, 2], [5, 5]]])}]
    turned = [{"last_hidden_state": np.array([[[3.0, 0], [2, 0], [-5, 5]]])}]
    assert check.agreement(model, batch, vectors, turned) == ("mean cosine of token vectors", 0.5)


def test_difference_is_relative_and_keeps_a_nan():
    assert check.difference(logits([100.0, 0.0]), logits([100.0, 1.0])) == pytest.approx(0.01)
    assert check.difference(logits([0.1, 0.0]), logits([0.1, 0.5])) == pytest.approx(0.5)
    assert np.isnan(check.difference(logits([0.0]), logits([np.nan])))


# --- refusals ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param({"min_agreement": 95}, "`min_agreement` must be a share from 0 to 1, got 95", id="share"),
        pytest.param({"texts": []}, "`texts` must be a list of sentences, at least one", id="no texts"),
        pytest.param({"texts": "a text"}, "`texts` must be a list of sentences", id="one string"),
        pytest.param({"texts": ["a"]}, "`texts` need a text model and its `tokenizer`", id="no tokenizer"),
    ],
)
def test_bad_arguments_are_refused(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export_onnx(tiny_bert(), None, tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_texts_of_the_user_are_what_is_compared(classifier, tmp_path, monkeypatch):
    (tmp_path / "texts.txt").write_text("No.\n\nIt rained.\n", encoding="utf-8")
    (tmp_path / "RTE").mkdir()
    lines = [f"{i}\tthe soup {i}\tnobody {i}\t{('entailment', 'not_entailment')[i % 2]}" for i in range(40)]
    for name, part in (("train", lines[:30]), ("dev", lines[30:])):
        text = "\n".join(["index\tsentence1\tsentence2\tlabel", *part])
        (tmp_path / "RTE" / f"{name}.tsv").write_text(text, encoding="utf-8")
    seen = []

    def stop(model, tokenizer, texts):
        seen.append(texts)
        raise RuntimeError("seen")

    monkeypatch.setattr(export, "make_batches", stop)
    for words in (("--texts", tmp_path / "texts.txt"), ("--dataset", "rte", "--data-dir", tmp_path)):
        CliRunner().invoke(cli.app, ["export", str(classifier), "--output", str(tmp_path / "out"), *map(str, words)])
    assert seen[0] == ["No.", "It rained."]
    assert len(seen[1]) == 3  # a tenth of the training rows, held out
    assert all(pair in [(f"the soup {i}", f"nobody {i}") for i in range(30)] for pair in seen[1])


def test_pairs_are_encoded_as_pairs(classifier):
    model, tokenizer = load_for_export(str(classifier))
    (batch, short, _) = check.make_batches(model, tokenizer, [("no", "it rained"), ("yes", "no")])
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 0]]
    assert short["input_ids"].shape == (1, 5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format": "tflite"}, "`format` must be one of onnx, openvino, got 'tflite'."),
        (
            {"precision": "float16"},
            "`precision` must be one of float32, int8 in the format onnx, got 'float16'; float16 is for `format='openvino'`.",
        ),
        ({"precision": "int4"}, "`precision` must be one of float32, int8 in the format onnx, got 'int4'."),
        ({"graph": "slow"}, "`graph` must be one of fastest, fused, portable, got 'slow'."),
        ({"embeddings": "int4"}, "`embeddings` must be one of float32, float16, int8, got 'int4'."),
        ({"opset": 20}, "`opset` 20 is of a portable ONNX file: give `graph='portable'`, or leave it out."),
        (
            {"opset": 13, "graph": "portable"},
            "`opset` must be 18 to 23, got 13: torch writes no other that was tested.",
        ),
        (
            {"format": "openvino", "graph": "fused"},
            "`graph` and `opset` are of ONNX files: OpenVINO's are made from the portable graph. Leave them out.",
        ),
        (
            {"format": "openvino", "precision": "int8", "embeddings": "float16"},
            "`embeddings` 'float16' does not go with `precision='int8'`: NNCF turns them into int8.",
        ),
    ],
)
def test_options_that_cannot_be_are_refused(fields, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        ExportOptions(**fields)


def test_mixed_texts_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"all be sentences, or all pairs of sentences, got items of \[1, 2\] parts"):
        export_onnx(tiny_bert(), object(), tmp_path, texts=["a", ("b", "c")])


def test_a_directory_with_weights_is_refused(classifier, tmp_path):
    with pytest.raises(ValueError, match=r"holds a PyTorch model \(model.safetensors\), whose config would be overwritten"):
        export_onnx(tiny_bert(), None, classifier)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="`output` must be a directory, got the file"):
        export_onnx(tiny_bert(), None, tmp_path / "file")


def test_unfinished_and_unknown_models_are_refused(tmp_path):
    model = to_shrp(tiny_bert())
    model.convert_layers_(1, pending=True)
    with pytest.raises(ValueError, match=r"Layers \[2\] are still pending: finish the training"):
        export_onnx(model, None, tmp_path / "out")
    with pytest.raises(ValueError, match="`model` is of type None"):
        export_onnx(torch.nn.Linear(1, 1), None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_too_large_for_one_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "MAX_BYTES", 1000)
    with pytest.raises(ValueError, match="GB of float32 weights, and one ONNX file holds 2 GB: prune it first"):
        export_onnx(tiny_bert(), None, tmp_path)


def test_an_old_torch_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    message = "torch 2.9.1+cpu is too old for torch.onnx's dynamo exporter: pip install 'torch>=2.11'"
    with pytest.raises(ImportError, match=f"^{re.escape(message)}$"):
        export_onnx(tiny_bert(), None, tmp_path)


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_extra_is_named(package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r"pip install 'shrp_hf\[onnx\]'"):
        export_onnx(tiny_bert(), None, tmp_path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param(("--dataset", "sst2", "--texts", "x.txt"), "Give one of `--dataset` and `--texts`", id="both"),
        pytest.param(("--data-dir", "x"), "`--data-dir x` belongs to `--dataset`", id="no data set"),
    ],
)
def test_options_that_contradict_are_refused(words, message):
    result = CliRunner().invoke(cli.app, ["export", "nowhere", "--output", "out", *words])
    assert message in str(result.exception)


def test_names_that_transformers_leaves_out_of_a_config_are_written(tmp_path):
    model = tiny_bert(num_labels=2)
    assert "id2label" not in model.config.to_diff_dict()
    path = export_model(model, None, tmp_path, FUSED)
    labels = json.loads(path.with_name("config.json").read_text(encoding="utf-8"))["id2label"]
    assert labels == {"0": "LABEL_0", "1": "LABEL_1"}


def test_threads_of_a_session_do_not_spin_between_calls(written):
    session = onnx_session(written)
    assert session.get_session_options().get_session_config_entry("session.force_spinning_stop") == "1"


def test_sessions_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="`path` must be an ONNX file or a directory that holds `model.onnx`"):
        onnx_session(tmp_path)
    (tmp_path / "model.onnx").touch()
    with pytest.raises(ValueError, match="`num_threads` must be at least 1, got 0"):
        onnx_session(tmp_path, 0)


def test_a_config_without_a_class_is_refused(tmp_path):
    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="names the class '' in its config"):
        load_for_export(str(tmp_path))
