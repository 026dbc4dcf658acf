"""Reads rows of a query, a candidate and how relevant it is."""

import math
from typing import Any

from datasets import Dataset

from shrp_hf.tasks.columns import Reading, find_column, find_columns
from shrp_hf.tasks.files import Table
from shrp_hf.tasks.kinds import RANKING
from shrp_hf.tasks.labels import as_number
from shrp_hf.tasks.sources import Source, places
from shrp_hf.tasks.splits import Sizes, divide
from shrp_hf.tasks.task import Task

QUERY_COLUMNS = ("query_id", "query-id", "qid", "question_id")


def load_ranking(source: Source, reading: Reading, sizes: Sizes) -> Task:
    """Builds a task of ranking; rows belong together by a column of query ids (`QUERY_COLUMNS`), else by the query's text.

    Args:
        source: The raw rows.
        reading: Which columns.
        sizes: How many rows are taken.

    Raises:
        ValueError: A column is missing, a text is empty, a relevance is no whole number from 0, a query id has two queries, or
            no query of a split has a relevant candidate: names file and line, or row.
    """
    splits = {split: _grouped(table, reading) for split, table in source.tables.items()}
    most = max(splits["train"]["grade"])
    notes = [*source.notes]
    for split, rows in splits.items():
        answered = {query for query, grade in zip(rows["query"], rows["grade"], strict=True) if grade > 0}
        total = len({*rows["query"]})
        if not answered:
            raise ValueError(f"{source.tables[split].source}: no query has a relevant candidate, so there is nothing to rank.")
        if len(answered) < total:
            notes.append(f"{total - len(answered):,} of {total:,} queries of {split} have no relevant candidate: left out")
            rows = rows.select([row for row, query in enumerate(rows["query"]) if query in answered])
        labels = [[min(grade, most) / most] for grade in rows["grade"]]
        splits[split] = rows.add_column("label", labels)
    division = divide(splits, lambda rows: list(rows["text"]), sizes, source.title)
    texts = find_columns(list(source.tables["train"].columns), reading).texts
    return Task(
        name=source.name,
        train=division.train,
        validation=division.validation,
        test=division.test,
        label_names=(),
        metric_names=RANKING.metric_names,
        reported=division.reported,
        kind_name=RANKING.name,
        notes=(f"queries in {texts[0]!r}, candidates in {texts[1]!r} of {source.title}", *notes, *division.notes),
    )


def _grouped(table: Table, reading: Reading) -> Dataset:
    """Returns `text`, `text_pair`, `query` (a number) and `grade` of every row."""
    names = list(table.columns)
    columns = find_columns(names, reading)
    if len(columns.texts) != 2 or len(columns.labels) != 1:
        raise ValueError(
            f"{table.source} must have a column of queries, one of candidates and one of labels: name them with "
            f"`--text-column`, `--text-pair-column` and `--label-column`. It has {names}."
        )
    queries, candidates = (list(table.columns[name]) for name in columns.texts)
    for name, values in zip(columns.texts, (queries, candidates), strict=True):
        wrong = [row for row, value in enumerate(values) if not (isinstance(value, str) and value.strip())]
        if wrong:
            raise ValueError(f"{places(table, wrong)}: column {name!r} must hold text in every row, got {values[wrong[0]]!r}.")
    grades = [_grade(label, table, row) for row, label in enumerate(table.columns[columns.labels[0]])]
    key = next(filter(None, (find_column(names, name) for name in QUERY_COLUMNS)), None)
    keys: list[Any] = queries if key is None else [str(value) for value in table.columns[key]]
    numbers: dict[Any, int] = {}
    first: dict[Any, str] = {}
    for row, (found, query) in enumerate(zip(keys, queries, strict=True)):
        numbers.setdefault(found, len(numbers))
        if first.setdefault(found, query) != query:
            raise ValueError(f"{table.where(row)}: the query {found!r} ({key}) is {query!r} here and {first[found]!r} before.")
    return Dataset.from_dict(
        {"text": queries, "text_pair": candidates, "query": [numbers[found] for found in keys], "grade": grades}
    )


def _grade(label: Any, table: Table, row: int) -> int:
    value = as_number(label)
    if value is None or not math.isfinite(value) or value < 0 or not float(value).is_integer():
        raise ValueError(f"{table.where(row)}: a relevance must be a whole number, 0 for none, got {label!r}.")
    return int(value)
