"""Where rows come from, the Hub or a directory, and one table of what is known about GLUE and SST-5."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, load_dataset
from datasets.exceptions import DatasetsError

_GLUE = "nyu-mll/glue"
_ACCURACY = ("accuracy",)
_ACCURACY_F1 = ("accuracy", "f1")
_ENTAILMENT = ("entailment", "not_entailment")

PAIR_COLUMNS = (
    ("premise", "hypothesis"),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("text", "text_pair"),
    ("text1", "text2"),
)
TEXT_COLUMNS = ("text", "sentence", "review", "content", "document")
LABEL_COLUMNS = ("label", "labels", "score", "target")
# How GLUE marks the rows of its hidden test sets, and SNLI those without agreement.
UNLABELLED = (-1, "-1", None)
SPLITS = {
    "train": ("train", "train_subset"),
    "validation": ("dev", "dev_matched", "validation", "validation_matched"),
    "test": ("test", "test_matched"),
}
"""Our splits to the file stems and Hub split names that hold them, the first one found winning."""


@dataclass(frozen=True)
class TaskSpec:
    """What is known about a task before its rows are read.

    Args:
        label_names: One name per class; empty for regression; None to find out from the labels.
        metric_names: Metrics, the headline first; empty to follow from the labels.
        hub: Hub data set and its configuration.
        label_range: Lowest and highest value of a regression label.
        strips_final_period: Whether final periods go, because the rows of a genre lack theirs (MNLI).
        holds_phrases: Whether training rows are pieces of one another (SST-2).
    """

    label_names: tuple[str, ...] | None = None
    metric_names: tuple[str, ...] = ()
    hub: tuple[str, str | None] | None = None
    label_range: tuple[float, float] = (-math.inf, math.inf)
    strips_final_period: bool = False
    holds_phrases: bool = False


SPECS = {
    "cola": TaskSpec(("unacceptable", "acceptable"), ("matthews_correlation", "accuracy"), (_GLUE, "cola")),
    "sst2": TaskSpec(("negative", "positive"), _ACCURACY, (_GLUE, "sst2"), holds_phrases=True),
    "mrpc": TaskSpec(("not_equivalent", "equivalent"), _ACCURACY_F1, (_GLUE, "mrpc")),
    "qqp": TaskSpec(("not_duplicate", "duplicate"), _ACCURACY_F1, (_GLUE, "qqp")),
    "stsb": TaskSpec((), ("pearson", "spearmanr"), (_GLUE, "stsb"), label_range=(0.0, 5.0)),
    "mnli": TaskSpec(("entailment", "neutral", "contradiction"), _ACCURACY, (_GLUE, "mnli"), strips_final_period=True),
    "qnli": TaskSpec(_ENTAILMENT, _ACCURACY, (_GLUE, "qnli")),
    "rte": TaskSpec(_ENTAILMENT, _ACCURACY, (_GLUE, "rte")),
    "wnli": TaskSpec(_ENTAILMENT[::-1], _ACCURACY, (_GLUE, "wnli")),
    "sst5": TaskSpec(("very negative", "negative", "neutral", "positive", "very positive"), _ACCURACY, ("SetFit/sst5", None)),
}

TASK_NAMES = (*SPECS, "docstrings")
"""Names that `load_task` knows; any other is a directory or a Hub data set."""


def canonical(name: str) -> str:
    """Brings the spellings of a task together: "SST-2" and "sst2" are one."""
    return name.lower().replace("-", "").replace("_", "")


def find_directory(name: str, data_dir: str | Path) -> Path:
    """Finds the folder of a task: one in `data_dir` that has its name in any spelling, or `data_dir` itself.

    Raises:
        ValueError: There is no such folder.
    """
    root = Path(data_dir).expanduser()
    if not root.is_dir():
        raise ValueError(f"`data_dir` must be a directory, got {str(data_dir)!r}, which does not exist.")
    folders = sorted(path for path in root.iterdir() if path.is_dir())
    for folder in folders:
        if canonical(folder.name) == canonical(name):
            return folder
    # A folder of another task would be read without complaint where its labels happen to fit.
    other = canonical(root.resolve().name)
    if _split_files(root) and (other == canonical(name) or other not in SPECS):
        return root
    raise ValueError(
        f"`data_dir` {str(root)!r} holds neither a folder named {name!r} nor that task's train.tsv; its folders are "
        f"{[folder.name for folder in folders]}."
    )


def read_directory(folder: Path) -> dict[str, Dataset]:
    """Reads the tab-separated files of a folder: UTF-8, one header line, no quoting (`csv.QUOTE_NONE`).

    Returns:
        Raw columns of strings per split; "train" and one or both of "validation" (dev.tsv) and "test".

    Raises:
        ValueError: There is no training file, or a file is empty or has a row of another width than its header.
    """
    files = _split_files(folder)
    if "train" not in files:
        names = " or ".join(f"{stem}.tsv" for stem in SPLITS["train"])
        held = sorted(path.name for path in folder.iterdir())
        raise ValueError(f"Directory {str(folder)!r} must hold {names}; it holds {held}.")
    return {split: _read_tsv(path) for split, path in files.items()}


def read_hub(path: str, config: str | None = None) -> dict[str, Dataset]:
    """Reads a data set of the Hub (or one that `datasets` holds in its cache).

    Returns:
        Raw columns per split; "train" and one or both of "validation" and "test".

    Raises:
        ValueError: It cannot be loaded, or has no training split.
    """
    try:
        splits = load_dataset(path, config)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise ValueError(
            f"{path!r} is none of the tasks {', '.join(TASK_NAMES)}, no directory, and could not be loaded from the "
            f"Hub as {path!r} with configuration {config!r} (append one as 'id:configuration'): {error}"
        ) from error
    found = {split: name for split, names in SPLITS.items() for name in names[::-1] if name in splits}
    if "train" not in found:
        raise ValueError(f"Data set {path!r} must have a split 'train', got {sorted(splits)}.")
    return {split: splits[name] for split, name in found.items()}


def text_columns(columns: Sequence[str]) -> tuple[str, ...]:
    """Guesses which columns hold the text, or the two texts of a pair.

    Raises:
        ValueError: None of the known names is there.
    """
    for names in (*PAIR_COLUMNS, *((name,) for name in TEXT_COLUMNS)):
        if set(names) <= set(columns):
            return names
    known = [*TEXT_COLUMNS, *("+".join(pair) for pair in PAIR_COLUMNS)]
    raise ValueError(f"no text column among {list(columns)}: rename one (or two, for a pair) to one of {known}.")


def label_column(columns: Sequence[str]) -> str:
    """Guesses which column holds the label.

    Raises:
        ValueError: None of the known names is there.
    """
    for name in LABEL_COLUMNS:
        if name in columns:
            return name
    raise ValueError(f"no label column among {list(columns)}: rename one to one of {list(LABEL_COLUMNS)}.")


def is_labelled(dataset: Dataset) -> bool:
    """Whether any row has a label."""
    name = next((name for name in LABEL_COLUMNS if name in dataset.column_names), None)
    return name is not None and any(label not in UNLABELLED for label in dataset[name])


def guess_label_names(dataset: Dataset) -> tuple[str, ...]:
    """Finds the classes of a data set that no table describes.

    Whole numbers are class indices, other numbers a regression target, words class names in alphabetical order.

    Returns:
        Class names, empty for regression.

    Raises:
        ValueError: There is no label column, or it holds fewer than two classes, or a negative one.
    """
    column = label_column(dataset.column_names)
    feature = dataset.features[column]
    if isinstance(feature, ClassLabel):
        return tuple(feature.names)
    values = _as_numbers([label for label in dataset[column] if label not in UNLABELLED])
    kinds = {type(value) for value in values}
    if kinds == {float}:
        return ()
    if kinds == {int} and min(values) >= 0 and max(values) > 0:
        return tuple(str(index) for index in range(max(values) + 1))
    if kinds in ({str}, {bool}) and len(set(values)) > 1:
        return tuple(sorted({str(value) for value in values}))
    raise ValueError(
        f"column {column!r} must hold at least two classes (indices from 0, or names) or decimal numbers, got values "
        f"such as {sorted(set(map(str, values)))[:5]}."
    )


def parse_label(label: Any, spec: TaskSpec) -> int | float:
    """Turns a raw label into a class index or a regression value.

    Raises:
        ValueError: It is neither an index or name of a class nor, for regression, a number within `label_range`.
    """
    names = spec.label_names or ()
    if label in names:
        return names.index(label)
    try:
        value = float(label)
    except (TypeError, ValueError):
        value = math.nan
    if names:
        if not (value.is_integer() and 0 <= value < len(names)):
            raise ValueError(f"label {label!r} is out of range: indices go from 0 to {len(names) - 1}, names: {names}.")
        return int(value)
    low, high = spec.label_range
    if not (math.isfinite(value) and low <= value <= high):
        raise ValueError(f"label {label!r} is out of range: it must be a number from {low} to {high}.")
    return value


def _as_numbers(labels: list[Any]) -> list[Any]:
    for number in (int, float):
        try:
            return [number(label) if isinstance(label, str) else label for label in labels]
        except ValueError:
            continue
    return labels


def _split_files(folder: Path) -> dict[str, Path]:
    paths = {
        split: [folder / f"{stem}.tsv" for stem in stems if (folder / f"{stem}.tsv").is_file()]
        for split, stems in SPLITS.items()
    }
    return {split: found[0] for split, found in paths.items() if found}


def _read_tsv(path: Path) -> Dataset:
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        lines = [line.rstrip("\r\n").split("\t") for line in file]
    if len(lines) < 2:
        raise ValueError(f"File {str(path)!r} must hold a header and at least one row, got {len(lines)} lines.")
    header, *rows = lines
    for number, row in enumerate(rows, start=2):
        if len(row) != len(header):
            raise ValueError(
                f"File {str(path)!r}, line {number}: expected {len(header)} tab-separated fields ({header}), got {len(row)}."
            )
    return Dataset.from_dict(dict(zip(header, zip(*rows, strict=True), strict=True)))
