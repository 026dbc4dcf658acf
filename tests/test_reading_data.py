"""One door for data: every kind of file and label is read as it is, or refused with its file and row."""

import csv
import json

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from transformers import EvalPrediction

from shrp_hf.tasks import Reading, Task, load_task
from shrp_hf.tasks.files import read_texts
from shrp_hf.tasks.splits import cut_stratified

COUNT = 60
REVIEWS = [f'the "film", number {i}\nis {"good" if i % 3 else "bad"}' for i in range(COUNT)]


def mood(i, names=("negative", "positive")):
    return names[i % 3 > 0]


def records(label=mood, text="text", column="label", count=COUNT):
    return [{"id": i, text: REVIEWS[i], column: label(i)} for i in range(count)]


def write_csv(path, rows, delimiter=","):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def write_text(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return str(path)


def refused(name, reading=None, **options):
    with pytest.raises(ValueError, match=r".") as error:
        load_task(str(name), reading=reading, **options)
    return str(error.value)


def all_rows(task):
    return {
        text: label
        for split in (task.train, task.validation, task.test)
        for text, label in zip(split["text"], split["label"], strict=True)
    }


# --- files ---


def writers():
    return {
        "csv": write_csv,
        "semicolons.csv": lambda path, rows: write_csv(path, rows, ";"),
        "tsv": lambda path, rows: write_csv(path, rows, "\t"),
        "jsonl": write_jsonl,
        "list.json": lambda path, rows: write_text(path, json.dumps(rows)),
        "data.json": lambda path, rows: write_text(path, json.dumps({"version": "1", "data": rows})),
        "lines.json": write_jsonl,
        "parquet": lambda path, rows: Dataset.from_list(rows).to_parquet(path) and str(path),
        "saved": lambda path, rows: Dataset.from_list(rows).save_to_disk(path) or str(path),
    }


@pytest.mark.parametrize("ending", writers())
def test_every_format_gives_the_same_rows(ending, tmp_path):
    rows = records(text="Review", column="Sentiment")
    name = writers()[ending](tmp_path / f"reviews.{ending}", rows)
    task = load_task(name)
    assert all_rows(task) == {row["Review"]: int(row["Sentiment"] == "positive") for row in rows}
    assert task.label_names == ("negative", "positive")
    assert task.config_kwargs["id2label"] == {0: "negative", 1: "positive"}


def test_one_file_is_divided_by_class_and_the_reported_rows_are_the_same_for_every_seed(tmp_path):
    name = write_csv(tmp_path / "reviews.csv", records())
    tasks = [load_task(name, seed=seed) for seed in (0, 0, 1)]
    sizes = [len(tasks[0].train), len(tasks[0].validation), len(tasks[0].test)]
    assert sizes == [44, 4, 12]
    assert sum(tasks[0].test["label"]) == 8  # two thirds, as in the file
    assert not set(tasks[0].test["text"]) & {*tasks[0].train["text"], *tasks[0].validation["text"]}
    assert tasks[0].validation.to_dict() == tasks[1].validation.to_dict() != tasks[2].validation.to_dict()
    assert tasks[0].test.to_dict() == tasks[2].test.to_dict()
    said = tasks[0].describe()
    assert "reviews: classification, 2 classes: positive 65.9%, negative 34.1%" in said
    assert "44 training rows, 4 held out of training to choose on, 12 to report on (file reviews.csv, rows set aside)" in said
    assert "text in 'text', label in 'label' of file reviews.csv" in said
    assert "12 of 60 were set aside to report on, with each class's share, the same ones for every seed" in said


def test_strata_give_equal_shares_and_keep_a_row_each():
    strata = ["large"] * 80 + ["small"] * 20 + ["alone"]
    kept, chosen = cut_stratified([str(row) for row in range(101)], strata, 20, seed=1)
    assert sorted(kept + chosen) == list(range(101))
    counts = [sum(strata[row] == name for row in chosen) for name in ("large", "small", "alone")]
    assert counts[2] == 0
    assert counts[1] == 4
    assert 15 <= counts[0] <= 17
    kept, chosen = cut_stratified(["same"] * 5 + ["other"] * 5 + ["third"], [0] * 11, 6, seed=0)
    assert len(chosen) in (1, 5, 6)  # rows of one text are on one side


@pytest.mark.parametrize(
    "names",
    [
        ("train.csv", "dev.csv", "test.csv"),
        ("reviews_Train.csv", "reviews_val.csv", "reviews_TEST.csv"),
        ("data/train-00000-of-00001.parquet", "data/validation-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"),
    ],
    ids=["plain", "words", "shards"],
)
def test_files_of_a_directory_are_its_splits(names, tmp_path):
    rows = records(count=30)
    (tmp_path / "data").mkdir()
    for name, part in zip(names, (rows[:20], rows[20:25], rows[25:]), strict=True):
        writers()[name.rpartition(".")[2]](tmp_path / name, part)
    task = load_task(str(tmp_path))
    expected = [{row["text"] for row in part} for part in (rows[:20], rows[20:25], rows[25:])]
    # Who brings held-out rows has them used, rather than a cut of the training rows.
    assert [set(split["text"]) for split in (task.train, task.validation, task.test)] == expected


def test_shards_are_joined_and_their_rows_found(tmp_path):
    rows = records(count=30)
    for number, part in enumerate((rows[:20], [*rows[20:], {"id": 1, "text": " ", "label": "positive"}])):
        write_csv(tmp_path / f"train-0000{number}-of-00002.csv", part)
    assert "train-00001-of-00002.csv', line 22: column 'text' must hold text" in refused(tmp_path)


def test_a_directory_that_is_not_clear_is_refused(tmp_path):
    for name in ("train.csv", "train.jsonl"):
        write_csv(tmp_path / "two" / name, records())
    assert "several files that could be its split 'train': ['train.csv', 'train.jsonl']" in refused(tmp_path / "two")
    for name in ("a.csv", "b.csv"):
        write_csv(tmp_path / "none" / name, records())
    assert "must hold a training file, such as train.csv" in refused(tmp_path / "none")
    write_csv(tmp_path / "one" / "reviews.csv", records())
    assert len(load_task(str(tmp_path / "one")).test) == 12
    assert "looks like a file or directory, which does not exist" in refused("reviews.csv")
    assert "must end in one of .csv, .tsv" in refused(write_text(tmp_path / "x.xlsx", "x"))


def test_saved_data_sets_keep_their_splits_and_their_classes(tmp_path):
    features = Features({"Text": Value("string"), "label": ClassLabel(names=["zebra", "ape"])})
    columns = {"Text": REVIEWS[:40], "label": [i % 2 for i in range(40)]}
    rows = Dataset.from_dict(columns, features=features)
    DatasetDict(train=rows.select(range(30)), test=rows.select(range(30, 40))).save_to_disk(tmp_path / "saved")
    task = load_task(str(tmp_path / "saved"))
    assert (task.label_names, task.reported) == (("zebra", "ape"), "directory saved, test")
    assert list(task.test["label"]) == columns["label"][30:]
    DatasetDict(test=rows).save_to_disk(tmp_path / "half")
    assert "must have a split 'train', got ['test']" in refused(tmp_path / "half")


# --- what is wrong with a file ---

GOOD = "text,label\n" + "".join(f"film {i},{i % 2}\n" for i in range(30))


@pytest.mark.parametrize(
    ("text", "encoding", "message"),
    [
        (GOOD + "café,1\n", "latin-1", "line 32: not UTF-8 (byte 0xe9). Save it as UTF-8, for example with `iconv"),
        (GOOD, "utf-16-le", "line 1: a zero byte. Save the file as UTF-8; it may be UTF-16"),
        (GOOD + "one, two,1\n", "utf-8", "line 32: expected 2 fields (['text', 'label']), got 3. If the row is whole, put a"),
        (GOOD + "one\n", "utf-8", "line 32: expected 2 fields (['text', 'label']), got 1"),
        (GOOD + '"never closed,1\nx,0\n', "utf-8", "line 32: unexpected end of data. A field that holds a quote"),
        (GOOD + '"a "quote" in it",1\n', "utf-8", "line 32: ',' expected after '\"'. A field that holds a quote"),
        (
            GOOD + " ,1\nx,0\n,0\n",
            "utf-8",
            "line 32, line 34: column 'text' must hold text in every row, got ' ': fill it in, remove the row",
        ),
        (GOOD + '"two\nlines",1\nx,\n', "utf-8", "line 34: no label in 'label'. Fill it in, or remove the row."),
        (
            GOOD.replace("\n", ",x\n").replace("label,x", "label,text"),
            "utf-8",
            "several columns named 'text' in ['text', 'label'",
        ),
        (
            "text,label\n" + "".join(f"film {i},a\n" for i in range(9)),
            "utf-8",
            "all 9 training rows have the label 'a': there must",
        ),
        (
            GOOD.partition("\n")[2],
            "utf-8",
            "among ['film 0', '0']: name it with `label_column` (`--label-column`); it is found",
        ),
        (GOOD.partition("\n")[2], "utf-8", "The first line looks like a row: put a line with the names of the columns above"),
        ("text,label\n", "utf-8", "must hold a header and at least one row, got 1 lines"),
        (GOOD.replace("label", "label,category").replace(",0", ",0,0").replace(",1", ",1,1"), "utf-8", None),
        (
            GOOD.replace("label", "rating,category").replace(",0", ",0,0").replace(",1", ",1,1"),
            "utf-8",
            "could each be the label",
        ),
        (
            GOOD.replace("text", "comment,review").replace("film", "x,film"),
            "utf-8",
            "could each be the text column among ['comm",
        ),
    ],
    ids=[
        *("latin-1", "UTF-16 without a mark", "too wide", "too narrow", "open quote", "stray quote", "empty texts"),
        *("no label", "twice a name", "one class", "no header", "no header, way out", "only a header"),
        *("a usual name wins", "two labels", "two texts"),
    ],
)
def test_a_bad_file_is_refused_with_line_and_way_out(text, encoding, message, tmp_path):
    name = write_text(tmp_path / "reviews.csv", text, encoding)
    if message is None:
        assert "label in 'label'" in load_task(name).describe()
    else:
        found = refused(name)
        assert "reviews.csv" in found
        assert message in found


def test_utf_16_with_its_mark_and_long_documents_are_read(tmp_path):
    task = load_task(write_text(tmp_path / "a.csv", GOOD, "utf-16"))
    assert "a.csv is UTF-16" in task.describe()
    limit = csv.field_size_limit()
    long = load_task(write_text(tmp_path / "b.csv", GOOD + f"{'word ' * 40000},1\n"))
    assert max(map(len, all_rows(long))) == 200000
    assert csv.field_size_limit() == limit


def test_quotes_of_a_tab_separated_file_are_its_own_unless_it_is_quoted(tmp_path):
    raw = 'text\tlabel\n"Fine" he said\t1\n5" disk\t0\n"whole"\t1\n' + "".join(f"{i}\t{i % 2}\n" for i in range(20))
    assert {'"Fine" he said', '5" disk', '"whole"'} <= set(all_rows(load_task(write_text(tmp_path / "raw.tsv", raw))))
    quoted = raw.replace('"Fine" he said', '"""Fine"" he said"').replace('5" disk', '"5"" disk"')
    task = load_task(write_text(tmp_path / "quoted.tsv", quoted))
    assert {'"Fine" he said', '5" disk', "whole"} <= set(all_rows(task))
    assert "quoted.tsv has quoted fields" in task.describe()
    # What GLUE's own tasks hold is never taken for quoted.
    folder = tmp_path / "cola"
    folder.mkdir()
    write_text(folder / "train.tsv", quoted)
    write_text(folder / "dev.tsv", "text\tlabel\nx\t1\n")
    assert '"""Fine"" he said"' in all_rows(load_task(str(folder)))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text": ', "line 2: no JSON"),
        ("a.jsonl", '{"text": "a", "label": 1}\n["b", 0]\n', "line 2: expected an object such as"),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text": 5, "label": 0}\n', "line 2: column 'text' must hold text"),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"label": 0}\n', "line 2: column 'text' must hold text"),
        ("a.json", '[{"text": "a", "label": 1}, {"text": "b"}]', "row 1 (counted from 0): no label in 'label'"),
        ("a.json", "{", "is no JSON"),
        ("a.json", "5", "must hold a list of objects"),
        ("a.parquet", "no parquet", "cannot be read as Parquet"),
    ],
    ids=["cut", "no object", "no text", "missing", "no label", "no JSON", "no list", "no Parquet"],
)
def test_other_bad_files_are_refused(name, text, message, tmp_path):
    found = refused(write_text(tmp_path / name, text))
    assert name in found
    assert message in found


def test_a_class_that_training_rows_lack_is_refused_with_its_row(tmp_path):
    write_csv(tmp_path / "train.csv", records())
    write_csv(tmp_path / "test.csv", [{"id": 0, "text": "x", "label": "neutral"}])
    message = refused(tmp_path)
    assert "test.csv', line 2: label 'neutral' is none of the 2 classes of the training rows (negative, positive)" in message


def test_a_text_file_in_another_encoding_is_refused_by_name(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_bytes("one\ncafé\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"texts\.txt', line 2: not UTF-8"):
        read_texts(path)
    path.write_text("one\n\ntwo\n", encoding="utf-8")
    assert read_texts(path) == ["one", "two"]


# --- columns ---


def test_columns_are_named_whatever_their_case(tmp_path):
    rows = [{"Left": f"a {i}", "Right": f"b {i}", "Same": mood(i)} for i in range(30)]
    name = write_csv(tmp_path / "pairs.csv", rows)
    task = load_task(name, reading=Reading("left", "RIGHT", "same"))
    assert task.is_pair
    assert {("a 3", "b 3")} <= set(zip(task.train["text"], task.train["text_pair"], strict=True)) | {
        *zip(task.test["text"], task.test["text_pair"], strict=True),
        *zip(task.validation["text"], task.validation["text_pair"], strict=True),
    }
    assert "no text column among ['Left', 'Right', 'Same']: name it with `text_column`" in refused(
        name, Reading(label_column="same")
    )
    assert "`text_column` is 'middle', which is not there: name one of" in refused(
        name, Reading("middle", label_column="same")
    )
    assert "each column can be one thing" in refused(name, Reading("left", label_column="left"))
    with pytest.raises(ValueError, match="`text_pair_column` 'right' needs `text_column`"):
        Reading(text_pair_column="right")
    with pytest.raises(ValueError, match="`task` must be one of classification, .*embeddings, got 'ner'"):
        Reading(task="ner")


# --- labels ---


@pytest.mark.parametrize(
    ("label", "names"),
    [
        (lambda i: mood(i, (-1, 1)), ("-1", "1")),
        (lambda i: i % 5 + 1, ("1", "2", "3", "4", "5")),
        (lambda i: i % 3 * 2, ("0", "2", "4")),
        (lambda i: (True, False)[i % 2], ("False", "True")),
        (lambda i: f"00{i % 2}", ("000", "001")),
        (lambda i: ("b", " a", "C ")[i % 3], ("C", "a", "b")),
    ],
    ids=["minus one", "stars", "holes", "booleans", "leading zeros", "spaces"],
)
@pytest.mark.parametrize("write", [write_csv, write_jsonl], ids=["csv", "jsonl"])
def test_labels_are_kept_as_they_are(label, names, write, tmp_path):
    task = load_task(write(tmp_path / f"rows.{write.__name__[6:]}", records(label)))
    assert task.label_names == names
    expected = {REVIEWS[i]: names.index(str(label(i)).strip()) for i in range(COUNT)}
    assert all_rows(task) == expected


def test_minus_one_marks_hidden_rows_only_where_it_is_no_class(tmp_path):
    write_csv(tmp_path / "train.csv", records(lambda i: i % 2))
    write_csv(tmp_path / "dev.csv", records(lambda i: i % 2, count=10))
    write_csv(tmp_path / "test.csv", records(lambda i: -1, count=10))
    task = load_task(str(tmp_path))
    assert "validation" in task.reported
    assert "test has no labels and is left alone" in task.describe()
    write_csv(tmp_path / "train.csv", records(lambda i: mood(i, (-1, 1))))
    write_csv(tmp_path / "dev.csv", records(lambda i: mood(i, (-1, 1)), count=10))
    task = load_task(str(tmp_path))
    assert "test" in task.reported
    assert set(task.test["label"]) == {0}


def test_zeros_and_ones_with_points_are_refused_until_the_task_is_named(tmp_path):
    name = write_csv(tmp_path / "rows.csv", records(lambda i: float(i % 2)))
    assert "labels such as 0.0, 1.0 can be classes or numbers to predict: say which with `--task classification`" in refused(
        name
    )
    classes = load_task(name, reading=Reading(task="classification"))
    assert (classes.label_names, classes.problem_type) == (("0", "1"), "single_label_classification")
    numbers = load_task(name, reading=Reading(task="regression"))
    assert (numbers.is_regression, numbers.num_labels, set(numbers.test["label"])) == (True, 1, {0.0, 1.0})
    assert "values from 0 to 1, mean 0.5" in numbers.describe()
    decimals = write_csv(tmp_path / "decimals.csv", records(lambda i: i / 8))
    assert load_task(decimals).problem_type == "regression"


@pytest.mark.parametrize("missing", ["", "nan", None], ids=["empty", "nan", "null"])
def test_a_regression_with_missing_values_is_refused(missing, tmp_path):
    rows = [*records(lambda i: i / 8), {"id": 0, "text": "x", "label": missing}]
    found = refused(write_jsonl(tmp_path / "rows.jsonl", rows))
    assert "rows.jsonl', line 61" in found
    assert "label" in found


@pytest.mark.parametrize("label", [lambda i: i % 5 + 1, lambda i: i % 10 / 4], ids=["stars", "decimals"])
def test_a_word_among_numbers_is_no_class(label, tmp_path):
    rows = records(lambda i: "N/A" if i == 4 else label(i))
    name = write_csv(tmp_path / "rows.csv", rows)
    assert "rows.csv', line 10: label 'N/A' among 59 numbers. Correct it, remove the row" in refused(
        name
    )  # texts of two lines
    assert "N/A" in load_task(name, reading=Reading(task="classification")).label_names


def test_labels_that_are_nearly_all_different_are_refused(tmp_path):
    name = write_csv(tmp_path / "rows.csv", records(lambda i: f"id {i}"))
    assert "60 different labels in 60 rows are hardly classes: name the right column with `--label-column`" in refused(name)
    assert "no class has two texts, so none of 60 rows can be held out" in refused(name, Reading(task="classification"))
    pairs = write_csv(tmp_path / "pairs.csv", records(lambda i: f"id {i // 2}"))
    assert load_task(pairs).num_labels == COUNT / 2
    name = write_csv(tmp_path / "numbers.csv", records(lambda i: i * 3))
    assert "`--task regression` or `--task classification` says which" in refused(name)


SEVERAL = [[name for bit, name in enumerate(("rude", "kind", "long")) if i >> bit & 1] for i in range(COUNT)]


@pytest.mark.parametrize("form", ["lists", "indices", "columns", "words", "multi-hot"])
def test_several_labels_a_row(form, tmp_path):
    reading, names = Reading(), ("kind", "long", "rude")
    if form == "lists":
        name = write_jsonl(tmp_path / "rows.jsonl", records(lambda i: SEVERAL[i], column="labels"))
    elif form == "indices":
        features = Features({"text": Value("string"), "labels": List(ClassLabel(names=list(names)))})
        columns = {"text": REVIEWS, "labels": [[names.index(word) for word in words] for words in SEVERAL]}
        Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "rows.parquet")
        name = str(tmp_path / "rows.parquet")
    elif form == "columns":
        rows = [{"text": REVIEWS[i], **{word: int(word in SEVERAL[i]) for word in names}} for i in range(COUNT)]
        name, reading = write_csv(tmp_path / "rows.csv", rows), Reading(label_column="Kind,long,rude")
    elif form == "words":
        name = write_csv(tmp_path / "rows.csv", records(lambda i: "|".join(SEVERAL[i])))
        reading = Reading(task="multilabel")
    else:
        name = write_jsonl(tmp_path / "rows.jsonl", records(lambda i: [int(word in SEVERAL[i]) for word in names]))
        names = ("0", "1", "2")
    task = load_task(name, reading=reading)
    assert (task.kind.name, task.problem_type, task.label_names) == ("multilabel", "multi_label_classification", names)
    order = ("kind", "long", "rude")
    assert all_rows(task) == {REVIEWS[i]: [float(word in SEVERAL[i]) for word in order] for i in range(COUNT)}
    assert "multilabel, 3 labels: " in task.describe()


def test_columns_of_several_labels_hold_zeros_and_ones(tmp_path):
    rows = [{"text": REVIEWS[i], "a": i % 2, "b": "maybe" if i == 7 else 0} for i in range(COUNT)]
    found = refused(write_csv(tmp_path / "rows.csv", rows), Reading(label_column="a,b"))
    assert "line 16: labels ['1', 'maybe'] must be a 0 or 1 for each of a, b" in found  # texts of two lines


def test_metrics_of_several_labels_equal_hand_values():
    rows = Dataset.from_dict({"text": list("abcd"), "label": [[1.0, 0.0], [1.0, 1.0], [0.0, 0.0], [1.0, 0.0]]})
    task = Task("toy", rows, rows, rows, ("x", "y"), ("f1_micro", "f1_macro"), "nowhere", "multilabel")
    logits = np.array([[2.0, -1.0], [-1.0, 3.0], [-2.0, -0.5], [0.5, 0.1]])
    found = task.compute_metrics(EvalPrediction(logits, np.asarray(rows["label"])))
    # x: 2 right, 1 missed; y: 1 right, 1 wrong. Together 3 right, 1 missed, 1 wrong.
    assert found == pytest.approx({"f1_micro": 0.75, "f1_macro": (0.8 + 2 / 3) / 2})
    assert task.bootstrap([EvalPrediction(logits, np.asarray(rows["label"]))], num_resamples=3).shape == (1, 3)


def test_other_rows_are_another_run(tmp_path):
    name = write_csv(tmp_path / "rows.csv", records())
    rows = [{**row, "other": row["id"] % 2} for row in records()]
    both = write_csv(tmp_path / "both" / "rows.csv", rows)
    first, same, other = (
        load_task(name, reading=reading).identity
        for name, reading in ((name, None), (both, None), (both, Reading(label_column="other")))
    )
    assert first == same != other
    assert first["train_rows"] == other["train_rows"] == 44
