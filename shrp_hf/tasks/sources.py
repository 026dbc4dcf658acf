"""Where rows come from, the Hub, a file or a directory, and one table of what is known about GLUE and SST-5."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError

from shrp_hf.tasks.files import SUFFIXES, Table, read_file

_MOST_NAMED = 3  # rows that a message names
_GLUE = "nyu-mll/glue"
_ACCURACY = ("accuracy",)
_ACCURACY_F1 = ("accuracy", "f1")
_ENTAILMENT = ("entailment", "not_entailment")

SPLITS = {
    "train": ("train", "train_subset"),
    "validation": ("dev", "dev_matched", "validation", "validation_matched", "valid", "val", "eval"),
    "test": ("test", "test_matched"),
}
"""Our splits to the file stems and Hub split names that hold them, the first one found winning."""
_SHARD = re.compile(r"-\d{5}-of-\d{5}$")
_SAVED = ("dataset_dict.json", "state.json")  # by `save_to_disk`: several splits, or one
_NO_DATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")


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
"""Names that `load_task` knows; any other is a file, a directory or a Hub data set."""


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
    if (_is_saved(root) or _split_files(root)) and (other == canonical(name) or other not in SPECS):
        return root
    raise ValueError(
        f"`data_dir` {str(root)!r} holds neither a folder named {name!r} nor that task's files; its folders are "
        f"{[folder.name for folder in folders]}."
    )


def read_path(path: Path, raw_quotes: bool = False) -> dict[str, Table]:
    """Reads a file, which is all training rows, or a directory.

    A directory holds a file for each split, told by its name (`train.csv`, `reviews-dev.jsonl`, shards as the Hub
    has them), or a single file, or what `save_to_disk` of `datasets` wrote; the files may lie in its folder `data`.

    Args:
        path: The file or directory.
        raw_quotes: Quotes in a TSV file are always text.

    Returns:
        Raw rows per split: "train", and perhaps "validation" and "test".

    Raises:
        ValueError: There is no training file or more than one, or a file cannot be read.
    """
    if path.is_file():
        return {"train": read_file(path, raw_quotes)}
    if _is_saved(path):
        return _read_saved(path)
    files = _split_files(path)
    if "train" not in files:
        held = sorted(file.name for file in path.iterdir())
        raise ValueError(
            f"Directory {str(path)!r} must hold a training file, such as train.csv ({', '.join(SUFFIXES)}); it holds {held}."
        )
    return {
        split: Table.joined([read_file(file, raw_quotes) for file in found], f"{found[0].parent.name}, {split}")
        for split, found in files.items()
    }


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
            f"{path!r} is none of the tasks {', '.join(TASK_NAMES)}, no file or directory, and could not be loaded from the "
            f"Hub as {path!r} with configuration {config!r} (append one as 'id:configuration'): {error}"
        ) from error
    return _known_splits(splits, path)


def _is_saved(path: Path) -> bool:
    return any((path / name).is_file() for name in _SAVED)


def _read_saved(path: Path) -> dict[str, Table]:
    try:
        saved = load_from_disk(str(path))
    except (OSError, ValueError, DatasetsError) as error:
        raise ValueError(f"Directory {str(path)!r} cannot be read as a data set saved by `save_to_disk`: {error}") from error
    splits = {"train": saved} if isinstance(saved, Dataset) else _known_splits(saved, str(path))
    return {split: Table.of(rows, f"{path.name}, {split}") for split, rows in splits.items()}


def _known_splits(splits: dict[str, Dataset], source: str) -> dict[str, Dataset]:
    found = {split: name for split, names in SPLITS.items() for name in names[::-1] if name in splits}
    if "train" not in found:
        raise ValueError(f"Data set {source!r} must have a split 'train', got {sorted(splits)}.")
    return {split: splits[name] for split, name in found.items()}


def _split_files(folder: Path) -> dict[str, list[Path]]:
    """Finds the files of each split by their names."""
    files = _data_files(folder) or (_data_files(folder / "data") if (folder / "data").is_dir() else [])
    stems: dict[str, list[Path]] = {}
    for file in files:
        stems.setdefault(_SHARD.sub("", file.stem.lower()), []).append(file)
    found = {}
    for split, names in SPLITS.items():
        exact = [stem for stem in names if stem in stems][:1]
        words = {*names, *(["training"] if split == "train" else [])}
        alike = exact or [stem for stem in stems if words & set(re.split("[^a-z0-9]+", stem)) and "mismatched" not in stem]
        candidates = [file for stem in alike for file in stems[stem]]
        if len(alike) > 1 or (len(candidates) > 1 and not all(_SHARD.search(file.stem) for file in candidates)):
            raise ValueError(
                f"Directory {str(folder)!r} has several files that could be its split {split!r}: "
                f"{[file.name for file in candidates]}. Leave one there, or name a file as the data set."
            )
        if candidates:
            found[split] = candidates
    return found if found or len(files) != 1 else {"train": files}


def _data_files(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in SUFFIXES and path.is_file() and path.name not in _NO_DATA and not path.name.startswith(".")
    )


@dataclass(frozen=True)
class Source:
    """Raw splits and where they come from.

    Args:
        name: What the task is called.
        tables: Rows of each split.
        spec: What is known about them; None: nothing.
        title: What messages call them.
    """

    name: str
    tables: Mapping[str, Table]
    spec: TaskSpec | None
    title: str

    @property
    def notes(self) -> tuple[str, ...]:
        """What was noticed while reading, each once."""
        return tuple(dict.fromkeys(note for table in self.tables.values() for note in table.notes))


def find_source(name: str, data_dir: str | Path | None) -> Source:
    """Finds and reads what a name stands for, as `load_task` describes it.

    Raises:
        ValueError: There is no such file, directory or data set, or it cannot be read.
    """
    spec = SPECS.get(canonical(name))
    if data_dir is None and spec is not None and spec.hub is not None:
        title = ":".join(filter(None, spec.hub))
        return Source(canonical(name), _tables(read_hub(*spec.hub), title), spec, title)
    path = Path(name).expanduser()
    if data_dir is not None:
        path = find_directory(name, data_dir)
    elif path.is_dir():
        path = path.resolve()
        name, spec = path.name, SPECS.get(canonical(path.name))
    elif path.is_file():
        is_split = path.stem.lower() in {stem for stems in SPLITS.values() for stem in stems}
        name = path.resolve().parent.name if is_split else path.stem
        return Source(name, read_path(path), None, f"file {path.name}")
    elif name.startswith((".", "/", "~")) or path.suffix.lower() in SUFFIXES:
        raise ValueError(f"`name` {name!r} looks like a file or directory, which does not exist.")
    else:
        hub_id, _, config = name.partition(":")
        return Source(name, _tables(read_hub(hub_id, config or None), name), None, name)
    tables = read_path(path, raw_quotes=spec is not None)
    return Source(canonical(name) if spec else name, tables, spec, f"directory {path.name}")


def _tables(splits: Mapping[str, Dataset], title: str) -> dict[str, Table]:
    return {split: Table.of(rows, f"{title}, {split}") for split, rows in splits.items()}


def places(table: Table, rows: Sequence[int]) -> str:
    """Names rows of a table by file and line, the first few where there are many."""
    more = f" and {len(rows) - _MOST_NAMED:,} more" if len(rows) > _MOST_NAMED else ""
    first, *others = (table.where(row) for row in rows[:_MOST_NAMED])
    return ", ".join((first, *(place.rpartition(", ")[2] for place in others))) + more
