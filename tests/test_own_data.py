"""Commands on data of one's own: the model's order of labels, the majority class, a dense model that has learned."""

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, BertTokenizer, DataCollatorWithPadding
from typer.testing import CliRunner

from shrp_hf import cli
from shrp_hf.measuring import flop_table
from shrp_hf.tasks import KINDS, Reading, Task, baseline_of, check_learned, label_names_of, load_task
from shrp_hf.workflows.compare import Comparison, Grid, Settings, read_cells, write_results
from shrp_hf.workflows.compress import Compression
from shrp_hf.workflows.compress import run as compress_run
from tests.test_compress import WORDS, flop_time
from tests.test_reading_data import COUNT, REVIEWS, SEVERAL, all_rows, mood, records, write_csv, write_jsonl
from tests.tiny import tiny_bert

# --- the model's order ---


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A classifier of three moods in an order of its own, with its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]), encoding="utf-8")
    made = tiny_bert(num_labels=2)
    made.config.id2label, made.config.label2id = {0: "Positive", 1: "Negative"}, {"Positive": 0, "Negative": 1}
    made.save_pretrained(folder)
    BertTokenizer(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def test_classes_stand_in_the_order_of_the_model(model, tmp_path):
    assert label_names_of(str(model)) == ("Positive", "Negative")
    words = write_csv(tmp_path / "words.csv", records())
    task = load_task(words, reading=Reading(label_names=("Positive", "Negative")))
    assert task.label_names == ("positive", "negative")
    assert all_rows(task) == {REVIEWS[i]: int(mood(i) == "negative") for i in range(COUNT)}
    # Whole numbers are the model's indices; a model that knows more classes keeps them.
    numbers = write_csv(tmp_path / "numbers.csv", records(lambda i: i % 2))
    for names, expected in (
        (("Positive", "Negative"), ("Positive", "Negative")),
        (("LABEL_0", "LABEL_1", "LABEL_2"), ("0", "1", "2")),
        (("1", "0"), ("1", "0")),
        ((), ("0", "1")),
    ):
        task = load_task(numbers, reading=Reading(label_names=names))
        assert task.label_names == expected
        assert all_rows(task)[REVIEWS[3]] == (0 if names == ("1", "0") else 1)
    three = load_task(words, reading=Reading(label_names=("neutral", "positive", "negative")))
    assert three.label_names == ("neutral", "positive", "negative")
    columns = [{"text": REVIEWS[i], "a": i % 2, "b": i % 3 % 2} for i in range(COUNT)]
    several = Reading(label_column="a,b", label_names=("b", "a"))
    assert all_rows(load_task(write_csv(tmp_path / "c.csv", columns), reading=several))[REVIEWS[5]] == [0.0, 1.0]


def test_a_model_without_a_trained_head_has_no_names(tmp_path):
    tiny_bert().bert.save_pretrained(tmp_path)
    assert label_names_of(str(tmp_path)) == ()


# --- what reading nothing would reach ---


def toy(labels, kind, names):
    rows = Dataset.from_dict({"text": [f"text {i}" for i in range(len(labels))], "label": labels})
    return Task("toy", rows, rows, rows, names, KINDS[kind].metric_names, "nowhere", kind)


def test_baselines_are_the_majority_the_frequent_labels_and_the_mean():
    found = baseline_of(toy([0, 1, 1, 1], "classification", ("a", "b")), toy([0, 1, 1, 1], "classification", ("a", "b")).test)
    assert (found.name, found.metrics["accuracy"]) == ("majority class (b)", 0.75)
    several = toy([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]], "multilabel", ("a", "b"))
    found = baseline_of(several, several.test)
    assert (found.name, found.metrics["f1_micro"]) == ("frequent labels (a)", pytest.approx(2 / 3))
    numbers = toy([1.0, 2.0, 6.0], "regression", ())
    found = baseline_of(numbers, numbers.test)
    assert found.name == "mean (3)"
    assert found.text() == "pearson -, spearmanr - (a constant has no correlation)"
    check_learned(numbers, 0.1, "model")
    for quality, shown in ((0.0, "0.0000"), (-0.2, "-0.2000"), (float("nan"), "undefined")):
        with pytest.raises(ValueError, match=f"its pearson on the 3 held-out rows is {shown}, not above 0"):
            check_learned(numbers, quality, "model")


# --- the commands ---


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setitem(Compression.__init__.__kwdefaults__, "measure", flop_time)
    monkeypatch.setattr(compress_run, "problem_when_reopened", lambda *args: "")
    monkeypatch.setattr(compress_run, "latency_table", flop_table)
    monkeypatch.setattr("shrp_hf.workflows.compress.verdict.NUM_RESAMPLES", 20)


@pytest.mark.parametrize("names", [("negative", "positive"), (-1, 1)], ids=["words", "minus one"])
def test_compress_takes_any_labels(names, model, quick, tmp_path):
    data = write_csv(tmp_path / "reviews.csv", records(lambda i: mood(i, names), text="Review", column="Sentiment"))
    words = ["compress", str(model), "--dataset", data, "--speedup", "1.5", "--max-trials", "1", "--experts", "1", "--force"]
    words += [
        "--expert-selector",
        "magnitude",
        "--recovery-epochs",
        "0",
        "--max-length",
        "16",
        "--shape",
        "2x16",
    ]
    result = CliRunner().invoke(cli.app, [*words, "--output", str(tmp_path / "out")])
    assert result.exit_code == 0, (result.output, result.exception)
    shares = {"negative": "34.1%", "positive": "65.9%"} if names[0] == "negative" else {"-1": "34.1%", "1": "65.9%"}
    assert all(f"{name} {share}" in result.output for name, share in shares.items())
    assert "Review" in result.output
    opened = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "model")
    assert opened.config.num_labels == 2
    report = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "| majority class (" in report
    assert "nan" not in report


def test_prune_takes_several_labels(model, tmp_path):
    data = write_jsonl(tmp_path / "rows.jsonl", records(lambda i: SEVERAL[i][:2], column="labels"))
    three = tmp_path / "three"
    made = tiny_bert(num_labels=3, problem_type="multi_label_classification")
    made.config.id2label, made.config.label2id = dict(enumerate(("rude", "kind", "long"))), {"rude": 0, "kind": 1, "long": 2}
    made.save_pretrained(three)
    BertTokenizer.from_pretrained(model).save_pretrained(three)
    words = ["prune", str(three), "--dataset", data, "--selector", "his", "--keep", "0.5", "--max-length", "16"]
    result = CliRunner().invoke(cli.app, [*words, "--output", str(tmp_path / "out")])
    assert result.exit_code == 0, (result.output, result.exception)
    assert "multilabel, 3 labels" in result.output
    assert "- frequent labels (" in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    task = load_task(data, reading=Reading(label_names=label_names_of(str(three))))
    assert task.label_names == ("rude", "kind", "long")
    tokenizer = BertTokenizer.from_pretrained(three)
    batch = DataCollatorWithPadding(tokenizer)([task.tokenize(tokenizer)["train"][i] for i in range(4)])
    assert batch["labels"].dtype == torch.float32
    pruned = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert pruned.config.problem_type == "multi_label_classification"
    expected = torch.nn.functional.binary_cross_entropy_with_logits(pruned(**batch).logits, batch["labels"])
    torch.testing.assert_close(pruned(**batch).loss, expected)


def test_compare_stops_at_a_dense_model_that_has_learned_nothing(model, tmp_path):
    task = load_task(write_csv(tmp_path / "rows.csv", records()), reading=Reading(label_names=label_names_of(str(model))))
    with torch.no_grad():  # always the rarer class
        made = AutoModelForSequenceClassification.from_pretrained(model)
        made.classifier.weight.zero_()
        made.classifier.bias.copy_(torch.tensor([-1.0, 1.0]))
    made.save_pretrained(tmp_path / "never")
    BertTokenizer.from_pretrained(model).save_pretrained(tmp_path / "never")
    settings = Settings(str(tmp_path / "never"), batch_size=8, max_length=16)
    grid = Grid(selectors=("random",), heads=(4,), recovery_epochs=(0,), seeds=(0,))
    for _ in range(2):  # a second start does not slip past the cell that is there
        with pytest.raises(
            ValueError, match=r"has learned nothing that could be kept: its accuracy on the 4 held-out rows is"
        ):
            Comparison(settings, grid, task, tmp_path / "out").run()
        assert [cell["method"] for cell in read_cells(tmp_path / "out")] == ["dense"]
    assert Comparison(settings, grid, task, tmp_path / "out", force=True).run() == {}
    written = {path.name: path for path in write_results(tmp_path / "out")}
    table = written["table.md"].read_text(encoding="utf-8")
    assert "| majority class (positive) | - | 1 | 0.6667 | - |" in table
    assert "nan" not in table


def test_shares_of_a_quality_that_is_not_above_zero_are_dashes(model, tmp_path):
    task = load_task(write_csv(tmp_path / "rows.csv", records(lambda i: (i * 7 % 13) / 4)))
    constant = tmp_path / "constant"
    made = tiny_bert(num_labels=1, problem_type="regression")
    with torch.no_grad():
        made.classifier.weight.zero_()
    made.save_pretrained(constant)
    BertTokenizer.from_pretrained(model).save_pretrained(constant)
    settings = Settings(str(constant), batch_size=8, max_length=16)
    grid = Grid(selectors=("random",), heads=(4,), recovery_epochs=(0,), seeds=(0,))
    with pytest.raises(ValueError, match="not above 0"):
        Comparison(settings, grid, task, tmp_path / "out").run()
    assert Comparison(settings, grid, task, tmp_path / "out", force=True).run() == {}
    written = {path.name: path for path in write_results(tmp_path / "out")}
    table = written["table.md"].read_text(encoding="utf-8")
    assert "| mean (" in table
    assert '"-" under "of dense": the pearson of a dense model is not above 0 or undefined' in table
    assert "nan" not in table
