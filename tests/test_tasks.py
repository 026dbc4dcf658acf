"""Tasks: every layout gives the same columns, splits never overlap, metrics equal hand values, bad input is named."""

import math
import sys
import warnings

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import EvalPrediction, PreTrainedTokenizerFast

from shrp_hf.tasks import TASK_NAMES, Task, load_task
from shrp_hf.tasks import sources as sources_module
from shrp_hf.tasks.metrics import METRICS
from shrp_hf.tasks.splits import cut_by_text, cut_whole_sentences
from shrp_hf.tasks.task import for_json, shown


def write_tsv(path, header, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ["\t".join(map(str, row)) for row in [header, *rows]]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def singles(prefix, count, num_labels):
    return [(f'{prefix} "quoted number {index} ü', index % num_labels) for index in range(count)]


@pytest.fixture
def data_dir(tmp_path):
    """The four layouts, small: 60 training rows each."""
    sentence = ("sentence", "label")
    for folder, num_labels in (("SST-2", 2), ("SST-5", 5)):
        write_tsv(tmp_path / folder / "train.tsv", sentence, singles("train", 60, num_labels))
        write_tsv(tmp_path / folder / "dev.tsv", sentence, singles("dev", 8, num_labels))
        write_tsv(tmp_path / folder / "test.tsv", sentence, singles("test", 10, num_labels))
    pair = ("sentence1", "sentence2", "label")
    for stem, count in (("train", 60), ("dev", 12)):
        rows = [(f"{stem} one {index}", f"{stem} two {index}", index % 11 / 2) for index in range(count)]
        write_tsv(tmp_path / "STS-B" / f"{stem}.tsv", pair, rows)
    genre = ("genre", "premise", "hypothesis", "label")
    for stem, count in (("train_subset", 60), ("dev_matched", 12)):
        # Three hypotheses for each premise; the genre "na" lacks final periods.
        rows = [
            ("na", f"{stem} premise {index // 3}", f"{stem} hypothesis {index}", index % 3)
            if index % 2
            else ("fiction", f"{stem} premise {index // 3}.", f"{stem} hypothesis {index}. ", index % 3)
            for index in range(count)
        ]
        write_tsv(tmp_path / "MNLI" / f"{stem}.tsv", genre, rows)
    return tmp_path


def texts(dataset):
    columns = [name for name in ("text", "text_pair") if name in dataset.column_names]
    return set(zip(*(dataset[column] for column in columns), strict=True))


def toy_task(num_labels=2, metric_names=("accuracy",), pair=False):
    columns = {"text": ["a b c d", "a"], **({"text_pair": ["b c", "d"]} if pair else {})}
    dataset = Dataset.from_dict({**columns, "label": [0, 0]})
    names = tuple(f"class {index}" for index in range(num_labels)) if num_labels > 1 else ()
    return Task("toy", dataset, dataset, dataset, names, metric_names, "nowhere")


@pytest.mark.parametrize(
    ("name", "columns", "num_labels", "problem_type", "headline", "reported", "test_rows"),
    [
        ("sst2", ["text", "label"], 2, "single_label_classification", "accuracy", "directory SST-2, test", 10),
        ("SST-5", ["text", "label"], 5, "single_label_classification", "accuracy", "directory SST-5, test", 10),
        ("stsb", ["text", "text_pair", "label"], 1, "regression", "pearson", "directory STS-B, validation", 12),
        (
            "mnli",
            ["text", "text_pair", "label"],
            3,
            "single_label_classification",
            "accuracy",
            "directory MNLI, validation",
            12,
        ),
    ],
    ids=["sst2", "sst5", "stsb", "mnli"],
)
def test_each_layout_gives_one_task(data_dir, name, columns, num_labels, problem_type, headline, reported, test_rows):
    task = load_task(name, data_dir)
    assert task.name == name.lower().replace("-", "")
    for dataset in (task.train, task.validation, task.test):
        assert dataset.column_names == columns
    assert (task.num_labels, task.problem_type, task.headline) == (num_labels, problem_type, headline)
    assert (task.reported, len(task.test)) == (reported, test_rows)
    assert task.is_pair == ("text_pair" in columns)
    assert 1 <= len(task.validation) <= 6
    assert len(task.train) + len(task.validation) == 60
    assert task.config_kwargs["num_labels"] == len(task.config_kwargs["id2label"]) == num_labels


def test_rows_are_read_unquoted_and_in_utf8(data_dir):
    task = load_task("sst5", data_dir)
    assert task.test[3] == {"text": 'test "quoted number 3 ü', "label": 3}
    assert load_task("stsb", data_dir).test["label"][:3] == [0.0, 0.5, 1.0]


def test_mnli_loses_final_periods_everywhere(data_dir):
    rows = [("fiction", "Why...", "...", 0), ("na", "e.g. this", "No. Yes.", 1)]
    write_tsv(data_dir / "MNLI" / "dev_matched.tsv", ("genre", "premise", "hypothesis", "label"), rows)
    task = load_task("mnli", data_dir)
    assert list(task.test["text"]) == ["Why", "e.g. this"]
    assert list(task.test["text_pair"]) == ["...", "No. Yes"]
    assert not any(text.endswith((".", " ")) for row in texts(task.train) | texts(task.validation) for text in row)


@pytest.mark.parametrize("name", ["sst2", "sst5", "stsb", "mnli"])
def test_splits_never_overlap_and_the_reported_one_is_fixed(data_dir, name):
    tasks = [load_task(name, data_dir, seed=seed) for seed in (0, 0, 1)]
    for task in tasks:
        assert not texts(task.train) & texts(task.validation)
        assert not set(task.train["text"]) & set(task.validation["text"])
        assert not texts(task.test) & (texts(task.train) | texts(task.validation))
        assert task.test.to_dict() == tasks[0].test.to_dict()
    assert tasks[0].validation.to_dict() == tasks[1].validation.to_dict()
    assert tasks[0].train.to_dict() == tasks[1].train.to_dict()
    assert tasks[0].validation.to_dict() != tasks[2].validation.to_dict()


def test_training_rows_that_are_reported_are_dropped(data_dir):
    rows = [*singles("train", 30, 5), *singles("test", 10, 5)]
    write_tsv(data_dir / "SST-5" / "train.tsv", ("sentence", "label"), rows)
    task = load_task("sst5", data_dir)
    assert len(task.train) + len(task.validation) == 30
    assert len(task.test) == 10


def test_sizes_are_limited(data_dir):
    task = load_task("sst5", data_dir, max_train=7, max_validation=3)
    assert (len(task.train), len(task.validation), len(task.test)) == (7, 3, 10)
    assert texts(load_task("sst5", data_dir, max_validation=3).train) > texts(task.train)


def test_cut_keeps_rows_of_one_text_together():
    repeated = [f"premise {index // 3}" for index in range(30)]
    train, held_out = cut_by_text(repeated, size=8, seed=3)
    assert len(held_out) == 6
    assert sorted(train + held_out) == list(range(30))
    assert not {repeated[row] for row in train} & {repeated[row] for row in held_out}


def test_phrase_cut_holds_out_whole_sentences_and_drops_their_pieces():
    sentences = [f"w{index}a  w{index}b w{index}c" for index in range(10)]
    pieces = [f"w{index}{part}" for index in range(10) for part in ("b c".split()[index % 2], "a")]
    rows = [*sentences, *pieces, "w0a w0b"]
    train, held_out = cut_whole_sentences(rows, size=4, seed=0)
    assert len(held_out) == 4
    assert all(row < 10 for row in held_out)
    kept = [" ".join(rows[row].split()) for row in train]
    assert not any(text in " ".join(rows[row].split()) for text in kept for row in held_out)
    assert len(train) == len(rows) - sum(
        any(row == out or set(rows[row].split()) < set(rows[out].split()) for out in held_out) for row in range(len(rows))
    )


def test_sst2_is_cut_by_sentence(tmp_path):
    # 20 sentences and a piece of each, as in the published training set.
    rows = [(text, 0) for index in range(20) for text in (f"s{index} has three words", f"s{index} has")]
    for stem in ("train", "dev"):
        write_tsv(tmp_path / f"{stem}.tsv", ("sentence", "label"), rows if stem == "train" else [("x", 0), ("y", 1)])
    task = load_task("sst2", tmp_path)
    assert (len(task.train), len(task.validation)) == (32, 4)
    assert all(text.endswith("words") for text in task.validation["text"])


def test_directory_itself_can_be_named(data_dir):
    assert load_task(str(data_dir / "SST-5")).name == "sst5"
    assert load_task("sst5", data_dir / "SST-5").num_labels == 5


@pytest.mark.parametrize(
    ("labels", "label_names", "metric_names"),
    [
        (["spam", "ham"], ("ham", "spam"), ("accuracy", "f1")),
        (["2", "0", "1"], ("0", "1", "2"), ("accuracy", "f1")),
        (["0.5", "3", "1.25"], (), ("pearson", "spearmanr")),
    ],
    ids=["words", "indices", "numbers"],
)
def test_any_directory_is_a_task(tmp_path, labels, label_names, metric_names):
    folder = tmp_path / "mine"
    for stem in ("train", "dev"):
        rows = [(f"{stem} {index}", labels[index % len(labels)]) for index in range(20)]
        write_tsv(folder / f"{stem}.tsv", ("text", "label"), rows)
    for task in (load_task(str(folder)), load_task("mine", tmp_path), load_task("mine", folder)):
        assert (task.name, task.label_names, task.metric_names) == ("mine", label_names, metric_names)
        assert task.reported == "directory mine, validation"
        expected = label_names.index(labels[0]) if label_names else float(labels[0])
        assert task.test["label"][0] == expected


def test_unlabelled_test_file_is_not_reported_on(data_dir):
    write_tsv(data_dir / "SST-2" / "test.tsv", ("sentence", "label"), [("hidden", -1)])
    assert load_task("sst2", data_dir).reported == "directory SST-2, validation"


def hub(monkeypatch, splits, asked=None):
    def load_dataset(path, config):
        if asked is not None:
            asked.append((path, config))
        if isinstance(splits, Exception):
            raise splits
        return splits

    monkeypatch.setattr(sources_module, "load_dataset", load_dataset)


def test_glue_from_the_hub_reports_on_validation_where_test_is_hidden(monkeypatch):
    def rows(prefix, count, label=None):
        return Dataset.from_dict(
            {
                "premise": [f"{prefix} premise {index}." for index in range(count)],
                "hypothesis": [f"{prefix} hypothesis {index}." for index in range(count)],
                "label": [index % 3 if label is None else label for index in range(count)],
                "idx": list(range(count)),
            }
        )

    asked = []
    splits = DatasetDict(
        train=rows("train", 30),
        validation_matched=rows("matched", 6),
        validation_mismatched=rows("mismatched", 6),
        test_matched=rows("test", 6, label=-1),
    )
    hub(monkeypatch, splits, asked)
    task = load_task("mnli")
    assert asked == [("nyu-mll/glue", "mnli")]
    assert (task.reported, task.test["text"][0]) == ("nyu-mll/glue:mnli, validation", "matched premise 0")


@pytest.mark.parametrize("name", [name for name in TASK_NAMES if name != "docstrings"])
def test_every_named_task_is_asked_of_the_hub(monkeypatch, name):
    asked = []
    rows = {"sentence1": [f"a{index}" for index in range(20)], "sentence2": ["b"] * 20, "label": [0, 1] * 10}
    test = {"sentence1": ["x", "y"], "sentence2": ["b", "b"], "label": [0, 1]}
    hub(monkeypatch, DatasetDict(train=Dataset.from_dict(rows), validation=Dataset.from_dict(test)), asked)
    task = load_task(name)
    assert asked == [("SetFit/sst5", None) if name == "sst5" else ("nyu-mll/glue", name)]
    assert set(task.metric_names) <= set(METRICS)
    assert task.is_regression == (name == "stsb")


def test_any_hub_data_set_is_a_task(monkeypatch):
    features = Features({"review": Value("string"), "label": ClassLabel(names=["bad", "good"])})
    columns = {"review": [f"review {index}" for index in range(20)], "label": [0, 1] * 10}
    # Some data sets mark rows without agreement with -1.
    train = Dataset.from_dict({**columns, "label": [*columns["label"][:-1], -1]}, features=features)
    test = Dataset.from_dict({"review": ["x", "y"], "label": [1, 0]}, features=features)
    asked = []
    hub(monkeypatch, DatasetDict(train=train, test=test), asked)
    task = load_task("someone/reviews:plain")
    assert asked == [("someone/reviews", "plain")]
    assert (task.label_names, task.reported) == (("bad", "good"), "someone/reviews:plain, test")
    assert len(task.train) + len(task.validation) == 19


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        (ConnectionError("no network"), "none of the tasks cola, .*no network"),
        (DatasetDict(test=Dataset.from_dict({"text": ["a"], "label": [0]})), "must have a split 'train'"),
        (
            DatasetDict(train=Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]})),
            "no class has two texts, so none of 2 rows can be held out",
        ),
        (
            DatasetDict({key: Dataset.from_dict({"words": ["a", "b"], "label": [0, 1]}) for key in ("train", "test")}),
            "no text column among .'words', 'label'.: name it with `text_column`",
        ),
        (
            DatasetDict({key: Dataset.from_dict({"text": ["a", "b"], "kind": [0, 1]}) for key in ("train", "test")}),
            "no label column among .'text', 'kind'.: name it with `label_column`",
        ),
        (
            DatasetDict({key: Dataset.from_dict({"text": ["a", None], "label": [0, 1]}) for key in ("train", "test")}),
            "column 'text' must hold text",
        ),
        (
            DatasetDict({key: Dataset.from_dict({"text": ["a", "b"], "label": [0, 0]}) for key in ("train", "test")}),
            "at least two classes",
        ),
    ],
    ids=["unreachable", "no train", "nothing to report", "no text", "no label", "null text", "one class"],
)
def test_bad_hub_data_sets_are_refused(monkeypatch, splits, message):
    hub(monkeypatch, splits)
    with pytest.raises(ValueError, match=message):
        load_task("someone/something")


@pytest.mark.parametrize(
    ("name", "header", "rows", "message"),
    [
        ("sst2", ("sentence",), [("only text",)], "no label column among .'sentence'"),
        ("sst2", ("words", "label"), [("a", 1)], "no text column among .'words', 'label'"),
        ("sst2", ("sentence", "label"), [("a", 0), ("b", 7)], "train.tsv', line 3: label '7' is out of range: .* 0 to 1"),
        ("sst2", ("sentence", "label"), [("a", "good")], "label 'good' is out of range"),
        ("stsb", ("sentence1", "sentence2", "label"), [("a", "b", 5.5)], "'5.5' is out of range: .* 0.0 to 5.0"),
        ("stsb", ("sentence1", "sentence2", "label"), [("a", "b", "nan")], "'nan' is out of range"),
        ("sst2", ("sentence", "label"), [("a", 0), ("b", "c", 1)], "line 3: expected 2 .*got 3"),
        ("sst2", ("sentence", "label"), [], "must hold a header and at least one row, got 1"),
        ("sst2", ("sentence", "label"), [("same", 0), ("same", 1)], "at least two texts"),
        ("mnli", ("sentence", "label"), [("a", 0)], "train holds .*but validation holds"),
    ],
    ids=[
        "no label",
        "no text",
        "index too large",
        "unknown name",
        "number too large",
        "not a number",
        "too wide",
        "empty",
        "nothing to hold out",
        "pair against single",
    ],
)
def test_bad_training_files_are_refused(data_dir, name, header, rows, message):
    path = next((data_dir / {"sst2": "SST-2", "stsb": "STS-B", "mnli": "MNLI"}[name]).glob("train*.tsv"))
    write_tsv(path, header, rows)
    with pytest.raises(ValueError, match=message):
        load_task(name, data_dir)


def test_bad_arguments_are_refused(data_dir, monkeypatch):
    hub(monkeypatch, ConnectionError("no network"))
    with pytest.raises(ValueError, match="'sst3' is none of the tasks"):
        load_task("sst3")
    with pytest.raises(ValueError, match="looks like a file or directory, which does not exist"):
        load_task("./nowhere")
    with pytest.raises(ValueError, match="`data_dir` must be a directory, got 'nowhere'"):
        load_task("sst2", "nowhere")
    with pytest.raises(ValueError, match="neither a folder named 'rte' .*SST-2"):
        load_task("rte", data_dir)
    with pytest.raises(ValueError, match="neither a folder named 'rte'"):
        load_task("rte", data_dir / "SST-2")
    (data_dir / "SST-2" / "train.tsv").unlink()
    with pytest.raises(ValueError, match=r"must hold a training file, such as train.csv .*; it holds .'dev.tsv', 'test.tsv'"):
        load_task("sst2", data_dir)
    with pytest.raises(ValueError, match="`max_train` must be at least 1, got 0"):
        load_task("sst5", data_dir, max_train=0)
    with pytest.raises(ValueError, match="`data_dir` must be left out"):
        load_task("docstrings", data_dir)


@pytest.mark.parametrize(
    ("num_labels", "predicted", "labels", "expected"),
    [
        # Two true positives, one false positive, one false negative, one true negative.
        (2, [1, 1, 1, 0, 0], [1, 1, 0, 1, 0], {"accuracy": 0.6, "f1": 2 / 3, "matthews_correlation": 1 / 6}),
        # F1 per class: 2/3, 2/3, 1.
        (3, [0, 0, 1, 2], [0, 1, 1, 2], {"accuracy": 0.75, "f1": 7 / 9}),
        # Nothing but class 0 among three: the average still runs over the classes seen.
        (3, [0, 0], [0, 0], {"accuracy": 1.0, "f1": 1.0}),
        (1, [1.0, 2.0, 4.0], [1.0, 3.0, 2.0], {"pearson": 0.5 / math.sqrt(7 / 3), "spearmanr": 0.5}),
    ],
    ids=["two classes", "three classes", "one class seen", "regression"],
)
def test_metrics_equal_hand_values(num_labels, predicted, labels, expected):
    task = toy_task(num_labels, tuple(expected))
    logits = np.array(predicted)[:, None] if num_labels == 1 else np.eye(num_labels)[predicted]
    for predictions in (logits, (logits, np.zeros(3))):
        measured = task.compute_metrics(EvalPrediction(predictions=predictions, label_ids=np.array(labels)))
        assert measured == pytest.approx(expected)


@pytest.mark.parametrize(
    ("predicted", "labels"),
    [
        ([2.0, 2.0, 2.0], [1.0, 3.0, 2.0]),
        # What one constant is made of in float32, by the batch.
        ([2.0, 2.0 + 2**-22, 2.0 - 2**-22], [1.0, 3.0, 2.0]),
        ([1.0, 3.0, 2.0], [2.0, 2.0, 2.0]),
        ([0.0, 0.0], [0.0, 1.0]),
        ([1.0], [2.0]),
    ],
    ids=["constant", "but for rounding", "labels", "zero", "one row"],
)
def test_correlation_of_a_constant_is_undefined_not_a_number(predicted, labels):
    task = toy_task(1, ("pearson", "spearmanr"))
    prediction = EvalPrediction(predictions=np.array(predicted)[:, None], label_ids=np.array(labels))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        measured = task.compute_metrics(prediction)
    assert set(measured) == {"pearson", "spearmanr"}
    assert all(math.isnan(value) for value in measured.values())
    assert {shown(value) for value in measured.values()} == {"undefined: constant predictions"}
    assert for_json({"a": measured, "b": (1.0, math.inf)}) == {"a": dict.fromkeys(measured), "b": [1.0, None]}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_refused(value):
    logits = np.zeros((3, 2))
    logits[1, 1] = value
    message = r"^`prediction` holds logits that are not finite, first in row 1 \(1 of 3\): a weight is damaged, "
    with pytest.raises(ValueError, match=message):
        toy_task(2, ("accuracy",)).compute_metrics(EvalPrediction(predictions=logits, label_ids=np.zeros(3, dtype=int)))


@pytest.mark.parametrize(
    ("num_labels", "metric"),
    [(2, "accuracy"), (2, "f1"), (3, "f1"), (1, "pearson")],
    ids=["accuracy", "f1", "macro f1", "pearson"],
)
def test_bootstrap_judges_the_rows_drawn(num_labels, metric):
    generator = np.random.default_rng(3)
    labels = generator.integers(max(2, num_labels), size=30)
    models = [EvalPrediction(generator.normal(size=(30, num_labels)), labels) for _ in range(2)]
    task = toy_task(num_labels, (metric,))
    drawn, expected = np.random.default_rng(5), []
    for _ in range(4):
        rows = drawn.integers(30, size=30)
        parts = [EvalPrediction(model.predictions[rows], labels[rows]) for model in models]
        expected.append([task.compute_metrics(part)[metric] for part in parts])
    # `compute_metrics` goes through the tables of `evaluate`, which hand out float32.
    np.testing.assert_allclose(task.bootstrap(models, num_resamples=4, seed=5), np.transpose(expected), rtol=1e-6)


def test_local_metrics_are_evaluate_modules():
    accuracy = METRICS["accuracy"]()
    accuracy.add_batch(predictions=[1, 0], references=[1, 1])
    accuracy.add(prediction=1, reference=1)
    assert accuracy.compute() == {"accuracy": pytest.approx(2 / 3)}


def test_logits_of_another_head_are_refused():
    with pytest.raises(ValueError, match=r"shape \(4, 3\) for this task, got \(4, 2\)"):
        toy_task(3).compute_metrics(EvalPrediction(predictions=np.zeros((4, 2)), label_ids=np.zeros(4, int)))


def test_missing_metric_packages_name_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "shrp_hf.tasks.metrics", None)
    with pytest.raises(ImportError, match=r"shrp_hf\[metrics\]"):
        toy_task().compute_metrics(EvalPrediction(predictions=np.zeros((1, 2)), label_ids=np.zeros(1, int)))
    with pytest.raises(ImportError, match=r"shrp_hf\[metrics\]"):
        toy_task().bootstrap([])


@pytest.fixture(scope="module")
def tokenizer():
    vocabulary = {token: index for index, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcd"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="[PAD]", model_max_length=5)


def test_tokenize_truncates_and_does_not_pad(tokenizer):
    splits = toy_task().tokenize(tokenizer, max_length=4)
    assert set(splits) == {"train", "validation", "test"}
    assert list(splits["train"]["input_ids"]) == [[2, 4, 5, 3], [2, 4, 3]]
    assert list(splits["train"]["label"]) == [0, 0]
    assert not {"text", "text_pair"} & set(splits["test"].column_names)
    assert max(map(len, toy_task().tokenize(tokenizer)["train"]["input_ids"])) == 5
    assert list(toy_task(pair=True).tokenize(tokenizer)["test"]["input_ids"])[1] == [2, 4, 3, 7, 3]


def test_tokenize_refuses_a_length_without_room(tokenizer):
    with pytest.raises(ValueError, match="`max_length` must exceed the 3 special tokens of a sequence, got 3"):
        toy_task(pair=True).tokenize(tokenizer, max_length=3)
