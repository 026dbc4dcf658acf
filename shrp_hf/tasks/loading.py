"""`load_task`: from a name to a `Task`, whatever the rows come from."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from datasets import Dataset

from shrp_hf.tasks.docstrings import LIBRARIES, docstring_rows
from shrp_hf.tasks.sources import (
    SPECS,
    UNLABELLED,
    TaskSpec,
    canonical,
    find_directory,
    guess_label_names,
    is_labelled,
    label_column,
    parse_label,
    read_directory,
    read_hub,
    text_columns,
)
from shrp_hf.tasks.splits import cut_by_text, cut_whole_sentences, sample
from shrp_hf.tasks.task import Task


def load_task(
    name: str,
    data_dir: str | Path | None = None,
    *,
    seed: int = 0,
    max_train: int | None = None,
    max_validation: int = 1000,
) -> Task:
    """Loads a task and cuts its held-out rows from the training set.

    The reported split is the source's test split where it is labelled, otherwise its validation split; it is whole,
    does not depend on `seed`, and none of its rows is in another split. The held-out rows are at most a tenth of the
    training set. Rows of SST-2 that are pieces of a held-out sentence are not trained on.

    Args:
        name: "docstrings" (from the installed packages), a GLUE task ("cola", "sst2", "mrpc", "qqp", "stsb", "mnli",
            "qnli", "rte", "wnli"), "sst5", a directory of tab-separated files, or a Hub data set as "id" or
            "id:configuration", whose text and label columns are guessed.
        data_dir: Directory that holds the task's files or a folder of its name, read instead of the Hub.
        seed: Seed of the held-out cut and of the training sample.
        max_train: Most training rows; None takes all (docstrings: up to 1,000 per class).
        max_validation: Most held-out rows.

    Returns:
        The task.

    Raises:
        ValueError: The name, directory, a column, a label or a size is wrong; the message says which and what helps.
        ImportError: A package that the docstring task reads is not installed.
    """
    for argument, value in (("max_train", max_train), ("max_validation", max_validation)):
        if value is not None and value < 1:
            raise ValueError(f"`{argument}` must be at least 1, got {value}.")
    if canonical(name) == "docstrings":
        if data_dir is not None:
            raise ValueError(f"`data_dir` must be left out for 'docstrings' (read where installed), got {data_dir!r}.")
        return _docstring_task(docstring_rows(seed=seed, max_train=max_train, max_validation=max_validation))
    name, splits, spec, source = _read(name, data_dir)
    if spec.label_names is None:
        with _naming(f"{source}, train"):
            spec = replace(spec, label_names=guess_label_names(splits["train"]))
    train = _normalise(splits["train"], spec, f"{source}, train")
    reported = next((split for split in ("test", "validation") if split in splits and is_labelled(splits[split])), None)
    if reported is None:
        raise ValueError(f"{source} must have a labelled test or validation split to report on, got {sorted(splits)}.")
    test = _normalise(splits[reported], spec, f"{source}, {reported}")
    if train.column_names != test.column_names:
        raise ValueError(f"{source}: train holds {train.column_names}, but {reported} holds {test.column_names}.")
    train = _without(train, test)
    cut = cut_whole_sentences if spec.holds_phrases else cut_by_text
    kept, held_out = cut(train["text"], min(max_validation, max(1, len(train) // 10)), seed)
    return Task(
        name=name,
        train=train.select(sample(kept, max_train, seed)),
        validation=train.select(held_out),
        test=test,
        label_names=spec.label_names or (),
        metric_names=spec.metric_names or (("accuracy", "f1") if spec.label_names else ("pearson", "spearmanr")),
        reported=f"{source}, {reported}",
    )


def _docstring_task(rows: Mapping[str, list[tuple[str, int]]]) -> Task:
    splits = {
        split: Dataset.from_dict({"text": [text for text, _ in pairs], "label": [label for _, label in pairs]})
        for split, pairs in rows.items()
    }
    return Task(
        name="docstrings",
        **splits,
        label_names=tuple(LIBRARIES),
        metric_names=("accuracy",),
        reported="docstrings of files kept apart",
    )


def _read(name: str, data_dir: str | Path | None) -> tuple[str, dict[str, Dataset], TaskSpec, str]:
    """Returns the task's name, its raw splits, what is known about it, and where the rows come from."""
    spec = SPECS.get(canonical(name))
    if data_dir is None and spec is not None and spec.hub is not None:
        return canonical(name), read_hub(*spec.hub), spec, ":".join(filter(None, spec.hub))
    if data_dir is not None:
        folder = find_directory(name, data_dir)
    elif Path(name).expanduser().is_dir():
        folder = Path(name).expanduser().resolve()
        name, spec = folder.name, SPECS.get(canonical(folder.name))
    elif name.startswith((".", "/", "~")):
        raise ValueError(f"`name` {name!r} looks like a directory, which does not exist.")
    else:
        path, _, config = name.partition(":")
        return name, read_hub(path, config or None), TaskSpec(), name
    return canonical(name) if spec else name, read_directory(folder), spec or TaskSpec(), f"directory {folder.name}"


def _normalise(dataset: Dataset, spec: TaskSpec, source: str) -> Dataset:
    """Brings raw columns to `text`, perhaps `text_pair`, and `label`; rows without a label are left out."""
    with _naming(source):
        columns = text_columns(dataset.column_names)
        raw = list(dataset[label_column(dataset.column_names)])
    rows = [row for row, label in enumerate(raw) if label not in UNLABELLED]
    labels = []
    for row in rows:
        with _naming(f"{source}, row {row} (counted from 0)"):
            labels.append(parse_label(raw[row], spec))
    texts: dict[str, list[str]] = {}
    for name, column in zip(("text", "text_pair"), columns, strict=False):
        values = list(dataset[column])
        texts[name] = [values[row] for row in rows]
        if not all(isinstance(text, str) for text in texts[name]):
            raise ValueError(f"{source}: column {column!r} must hold text in every row.")
        if spec.strips_final_period:
            # A text of nothing but periods stays as it is.
            texts[name] = [text.rstrip(" .") or text for text in texts[name]]
    return Dataset.from_dict({**texts, "label": labels})


@contextmanager
def _naming(source: str) -> Iterator[None]:
    """Puts where it happened in front of an error."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def _without(dataset: Dataset, other: Dataset) -> Dataset:
    """Drops the rows whose texts are those of a row of `other`."""
    names = [name for name in dataset.column_names if name != "label"]
    taken = set(zip(*(other[name] for name in names), strict=True))
    rows = zip(*(dataset[name] for name in names), strict=True)
    return dataset.select([index for index, row in enumerate(rows) if row not in taken])
