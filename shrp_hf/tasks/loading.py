"""`load_task`: from a name to a `Task`, whatever the rows come from."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datasets import Dataset

from shrp_hf.defaults import SEED
from shrp_hf.tasks.columns import Columns, Reading, find_column, find_columns
from shrp_hf.tasks.docstrings import LIBRARIES, docstring_rows
from shrp_hf.tasks.files import Table
from shrp_hf.tasks.kinds import CLASSIFICATION, EMBEDDINGS, MULTILABEL, RANKING, REGRESSION, TOKENS
from shrp_hf.tasks.labels import UNLABELLED, Labels, as_number, as_word, in_order_of, is_missing, understand
from shrp_hf.tasks.loading_embeddings import is_beir, load_embeddings
from shrp_hf.tasks.loading_ranking import load_ranking
from shrp_hf.tasks.loading_tokens import holds_tags, load_tokens
from shrp_hf.tasks.sources import Source, TaskSpec, canonical, find_source, places
from shrp_hf.tasks.splits import MOST_REPORTED, REPORTED_SHARE, Sizes, cut_by_text, cut_stratified, cut_whole_sentences, sample
from shrp_hf.tasks.task import Task

_MOST_WORDS = 10  # a tenth of the labels: what is not a number among numbers


def load_task(
    name: str,
    data_dir: str | Path | None = None,
    reading: Reading | None = None,
    *,
    seed: int = SEED,
    max_train: int | None = None,
    max_validation: int = 1000,
) -> Task:
    """Loads a task: its kind, its rows, what their labels mean, and three splits that share no text.

    The reported split is the source's test split where it is labelled, otherwise its validation split. Of data
    that has neither, a fifth (at most 2,000 rows) is set aside for it, with each class's share. It is whole, does
    not depend on `seed`, and none of its rows is in another split. The held-out rows are the validation split of
    data that has both (of GLUE's tasks and "sst5" never), otherwise at most a tenth of the training set. Rows of
    SST-2 that are pieces of a held-out sentence are not trained on. `Task.describe` says what was understood.

    Args:
        name: "docstrings" (from the installed packages), a GLUE task ("cola", "sst2", "mrpc", "qqp", "stsb", "mnli",
            "qnli", "rte", "wnli"), "sst5", a file (CSV, TSV, JSON Lines, JSON, Parquet), a directory of such files
            or of `save_to_disk`, or a Hub data set as "id" or "id:configuration".
        data_dir: Directory that holds the task's files or a folder of its name, read instead of the Hub.
        reading: Which columns and what kind of task, where that is not to be found out.
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
    reading = reading or Reading()
    if canonical(name) == "docstrings":
        if data_dir is not None:
            raise ValueError(f"`data_dir` must be left out for 'docstrings' (read where installed), got {data_dir!r}.")
        if reading.text_column or reading.label_column or reading.task not in (None, CLASSIFICATION.name):
            raise ValueError(f"columns and `task` must be left out for 'docstrings', a classification, got {reading}.")
        return _docstring_task(docstring_rows(seed=seed, max_train=max_train, max_validation=max_validation))
    sizes = Sizes(seed, max_train, max_validation)
    if reading.task == EMBEDDINGS.name or (reading.task is None and is_beir(name, data_dir)):
        return load_embeddings(name or None, data_dir, reading, sizes)
    for argument in ("corpus", "pairs"):
        if getattr(reading, argument) is not None:
            raise ValueError(f"`{argument}` {getattr(reading, argument)!r} is for `--task embeddings` alone: leave it out.")
    source = find_source(name, data_dir)
    load = LOADERS.get(reading.task or kind_of(source), _load_labelled)
    return load(source, reading, sizes)


def kind_of(source: Source) -> str | None:
    """Returns the kind of a task whose columns are sure to say it; None where labels have to be looked at."""
    return TOKENS.name if holds_tags(source.tables["train"]) else None


def _load_labelled(source: Source, reading: Reading, sizes: Sizes) -> Task:
    return _Loader(source, reading).task(sizes.seed, sizes.max_train, sizes.max_validation)


LOADERS = {TOKENS.name: load_tokens, RANKING.name: load_ranking}
"""What reads the rows of kinds that have more than texts and labels."""


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


class _Loader:
    """Brings raw splits to one form, and remembers what is worth saying."""

    def __init__(self, source: Source, reading: Reading) -> None:
        self.source, self.reading, self.spec = source, reading, source.spec or TaskSpec()
        train = source.tables["train"]
        with _naming(f"{source.title}, train"):
            self.columns = find_columns(list(train.columns), reading)
        self.class_names = (train.class_names or {}).get(self.columns.labels[0], ())
        # The mark of a row without a label; a class where nothing says otherwise.
        self.has_mark = source.spec is not None or bool(self.class_names)
        self.notes = list(source.notes)
        rows, raw = self._labelled(train, self.columns)
        self._refuse_mixture(train, rows, raw)
        with _naming(f"{source.title}, train"):
            self.labels = self._understand(raw)
        self.train = self._normalised(train, self.columns, rows, raw)
        if source.spec is None and len({str(label) for label in self.train["label"]}) < 2:
            raise ValueError(
                f"{source.title}, train: all rows have one label, but there must be at least two classes or values."
            )

    def task(self, seed: int, max_train: int | None, max_validation: int) -> Task:
        """Divides the rows and builds the task; the arguments are those of `load_task`."""
        source, kind = self.source, self.labels.kind
        labelled = [split for split in ("test", "validation") if self._is_labelled(split)]
        train, held_out = self.train, None
        if labelled:
            test, reported = self._split(labelled[0]), f"{source.title}, {labelled[0]}"
            train = self._without(train, test, "reported")
        else:
            train, test, reported = self._set_aside()
        if len(labelled) == 2 and source.spec is None:
            held_out = self._without(self._split("validation"), test, "reported", "validation")
            held_out = held_out.select(sample(range(len(held_out)), max_validation, seed))
            train = self._without(train, held_out, "held-out")
            kept: Sequence[int] = range(len(train))
        else:
            size = min(max_validation, max(1, len(train) // 10))
            if source.spec is None:
                kept, chosen = cut_stratified(train["text"], kind.strata(train["label"]), size, seed)
            else:
                cut = cut_whole_sentences if self.spec.holds_phrases else cut_by_text
                kept, chosen = cut(train["text"], size, seed)
            held_out = train.select(chosen)
        return Task(
            name=source.name,
            train=train.select(sample(kept, max_train, seed)),
            validation=held_out,
            test=test,
            label_names=self.labels.names,
            metric_names=self.spec.metric_names or kind.metric_names,
            reported=reported,
            kind_name=kind.name,
            notes=(f"{self.columns} of {source.title}", *self.notes),
        )

    def _understand(self, raw: list[Any]) -> Labels:
        reading, names = self.reading, self.spec.label_names
        if names is not None:
            kind = CLASSIFICATION if names else REGRESSION
            if reading.task not in (None, kind.name):
                raise ValueError(f"`task` must be {kind.name!r} for {self.source.name!r}, got {reading.task!r}.")
            labels = Labels(kind, names, tuple(range(len(names))), self.spec.label_range)
        elif len(self.columns.labels) > 1:
            if reading.task not in (None, MULTILABEL.name):
                raise ValueError(f"several columns of labels are a task {MULTILABEL.name!r}, but `task` is {reading.task!r}.")
            columns = self.columns.labels
            labels = Labels(MULTILABEL, columns, tuple(range(len(columns))), is_multi_hot=True)
        else:
            labels = understand(raw, reading.task, self.class_names)
        return in_order_of(labels, reading.label_names)

    def _refuse_mixture(self, table: Table, rows: Sequence[int], raw: Sequence[Any]) -> None:
        """Refuses a column of numbers with a few words in it, such as NA or n/a: they would become classes."""
        if self.has_mark or self.reading.task is not None or len(self.columns.labels) > 1:
            return
        words = [row for row, label in zip(rows, raw, strict=True) if as_number(label) is None]
        if 0 < len(words) <= len(raw) // _MOST_WORDS and all(isinstance(label, str | int | float) for label in raw):
            word = raw[rows.index(words[0])]
            raise ValueError(
                f"{places(table, words)}: label {word!r} among {len(raw) - len(words):,} numbers. Correct it, remove "
                "the row, or give `--task classification` if it is a class."
            )

    def _is_hidden(self, label: Any) -> bool:
        return is_missing(label) or (self.has_mark and as_word(label) == str(UNLABELLED))

    def _is_labelled(self, split: str) -> bool:
        """Whether a split has labels; that it has none is said."""
        table = self.source.tables.get(split)
        if table is None:
            return False
        column = find_column(list(table.columns), self.columns.labels[0])
        labels = list(table.columns[column]) if column else []
        mark = str(UNLABELLED)
        is_mark = mark not in self.labels.names and self.labels.kind is CLASSIFICATION
        if all(is_missing(label) or ((self.has_mark or is_mark) and as_word(label) == mark) for label in labels):
            self.notes.append(f"{split} has no labels and is left alone")
            return False
        return True

    def _split(self, split: str) -> Dataset:
        table = self.source.tables[split]
        names = [find_column(list(table.columns), name) for name in (*self.columns.texts, *self.columns.labels)]
        count = len(self.columns.texts)
        if None in names:
            raise ValueError(
                f"{self.source.title}: train holds {list(self.source.tables['train'].columns)} ({self.columns}), but {split} "
                f"holds {list(table.columns)}."
            )
        columns = Columns(tuple(names[:count]), tuple(names[count:]))
        return self._normalised(table, columns, *self._labelled(table, columns))

    def _labelled(self, table: Table, columns: Columns) -> tuple[list[int], list[Any]]:
        """Returns the rows that have a label, and the labels; a row without one is refused unless it is marked so."""
        values = [list(table.columns[name]) for name in columns.labels]
        if len(values) > 1:
            raw: list[Any] = [list(row) for row in zip(*values, strict=True)]
            gone = [row for row, several in enumerate(raw) if any(map(is_missing, several))]
        else:
            raw = values[0]
            gone = [row for row, label in enumerate(raw) if self._is_hidden(label)]
            if self.reading.task == MULTILABEL.name:  # an empty field is a row to which no label applies
                raw, gone = [[] if is_missing(label) else label for label in raw], []
        if gone and not self.has_mark:
            raise ValueError(
                f"{places(table, gone)}: no label in {', '.join(map(repr, columns.labels))}. Fill it in, or remove "
                f"{'the row' if len(gone) == 1 else f'these {len(gone)} rows'}."
            )
        if gone:
            self.notes.append(f"{len(gone)} rows without a label were left out")
        dropped = set(gone)
        rows = [row for row in range(len(raw)) if row not in dropped]
        if not rows:
            raise ValueError(f"{table.source}: no row has a label in {', '.join(map(repr, columns.labels))}.")
        return rows, [raw[row] for row in rows]

    def _normalised(self, table: Table, columns: Columns, rows: Sequence[int], raw: Sequence[Any]) -> Dataset:
        """Brings raw columns to `text`, perhaps `text_pair`, and `label`."""
        labels = []
        for row, label in zip(rows, raw, strict=True):
            try:
                labels.append(self.labels.parse(label))
            except ValueError as error:
                raise ValueError(f"{table.where(row)}: {error}") from error
        texts: dict[str, list[str]] = {}
        for name, column in zip(("text", "text_pair"), columns.texts, strict=False):
            values = list(table.columns[column])
            texts[name] = [values[row] for row in rows]
            wrong = [row for row in rows if not self._is_text(values[row])]
            if wrong:
                raise ValueError(
                    f"{places(table, wrong)}: column {column!r} must hold text in every row, got {values[wrong[0]]!r}: "
                    "fill it in, remove the row, or name another column."
                )
            if self.spec.strips_final_period:
                # A text of nothing but periods stays as it is.
                texts[name] = [text.rstrip(" .") or text for text in texts[name]]
        return Dataset.from_dict({**texts, "label": labels})

    def _is_text(self, value: Any) -> bool:
        # GLUE itself has a few empty texts.
        return isinstance(value, str) and (self.source.spec is not None or bool(value.strip()))

    def _set_aside(self) -> tuple[Dataset, Dataset, str]:
        """Cuts the reported rows from a training set that came alone."""
        source, train, kind = self.source, self.train, self.labels.kind
        if source.spec is not None:
            raise ValueError(f"{source.title} must have a labelled test or validation split, got {sorted(source.tables)}.")
        size = min(MOST_REPORTED, max(1, len(train) // REPORTED_SHARE))
        kept, chosen = cut_stratified(train["text"], kind.strata(train["label"]), size, seed=0)
        self.notes.append(
            f"no labelled test rows came along: {len(chosen):,} of {len(train):,} were set aside to report on, with each "
            "class's share, the same ones for every seed"
        )
        return train.select(kept), train.select(chosen), f"{source.title}, rows set aside"

    def _without(self, dataset: Dataset, other: Dataset, role: str, own: str = "training") -> Dataset:
        """Drops the rows whose texts are those of a row of `other`, and says so."""
        names = [name for name in dataset.column_names if name != "label"]
        taken = set(zip(*(other[name] for name in names), strict=True))
        rows = zip(*(dataset[name] for name in names), strict=True)
        kept = [index for index, row in enumerate(rows) if row not in taken]
        if len(kept) < len(dataset):
            self.notes.append(f"{len(dataset) - len(kept):,} {own} rows are also {role} ones and were left out")
        return dataset.select(kept)


@contextmanager
def _naming(source: str) -> Iterator[None]:
    """Puts where it happened in front of an error."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
