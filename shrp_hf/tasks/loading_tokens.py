"""Reads rows with a tag for each word: CoNLL files, or a column of words beside a column of tags."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset

from shrp_hf.tasks.columns import Reading, find_column
from shrp_hf.tasks.files import Table
from shrp_hf.tasks.kinds import TOKENS
from shrp_hf.tasks.sources import Source
from shrp_hf.tasks.splits import Sizes, divide
from shrp_hf.tasks.task import Task
from shrp_hf.tasks.tokens import OUTSIDE

WORD_COLUMNS = ("tokens", "words")
TAG_COLUMNS = ("tags", "ner_tags", "labels", "label", "pos_tags", "ner")
_TAG = re.compile(r"[BI](-\S+)?")


def holds_tags(table: Table) -> bool:
    """Whether a table has a column of words and one of tags, both lists: it can be nothing else then."""
    names = list(table.columns)
    found = [next(filter(None, (find_column(names, name) for name in usual)), None) for usual in (WORD_COLUMNS, TAG_COLUMNS)]
    return all(name is not None and _is_listed(table.columns[name]) for name in found)


def load_tokens(source: Source, reading: Reading, sizes: Sizes) -> Task:
    """Builds a task of token classification.

    Args:
        source: The raw rows.
        reading: Which columns, and the tags of the model in their order.
        sizes: How many rows are taken.

    Raises:
        ValueError: A column is missing, a row has not as many tags as words, a word is empty, or a tag is outside BIO or of
            an entity that the training rows do not have: names file and line, or row.
    """
    columns = {split: _columns(table, reading) for split, table in source.tables.items()}
    read = {split: _tagged(table, *columns[split]) for split, table in source.tables.items()}
    names = _in_order(read["train"][1], reading.label_names)
    index = {name: place for place, name in enumerate(names)}
    splits = {}
    for split, (words, tags) in read.items():
        for row, said in enumerate(tags):
            unknown = next((tag for tag in said if tag not in index), None)
            if unknown is not None:
                where = _where(source.tables[split], row, said.index(unknown))
                raise ValueError(
                    f"{where}: tag {unknown!r} is none of the {len(names)} tags of the training rows ({', '.join(names)}): "
                    "correct it, or add rows with such an entity to the training set."
                )
        splits[split] = Dataset.from_dict({"tokens": words, "label": [[index[tag] for tag in said] for said in tags]})
    division = divide(splits, lambda rows: [" ".join(words) for words in rows["tokens"]], sizes, source.title)
    words_in, tags_in = columns["train"]
    return Task(
        name=source.name,
        train=division.train,
        validation=division.validation,
        test=division.test,
        label_names=names,
        metric_names=TOKENS.metric_names,
        reported=division.reported,
        kind_name=TOKENS.name,
        notes=(f"words in {words_in!r}, tags in {tags_in!r} of {source.title}", *source.notes, *division.notes),
    )


def _columns(table: Table, reading: Reading) -> tuple[str, str]:
    found = []
    given = ((reading.text_column, "text-column", WORD_COLUMNS), (reading.label_column, "label-column", TAG_COLUMNS))
    for named, argument, usual in given:
        names = (named,) if named else usual
        column = next(filter(None, (find_column(list(table.columns), name) for name in names)), None)
        if column is None or not _is_listed(table.columns[column]):
            raise ValueError(
                f"{table.source} must hold a list of words and a list of tags in each row (columns such as tokens and tags), "
                f"or be a CoNLL file: name the column with `--{argument}`. It has {list(table.columns)}."
            )
        found.append(column)
    return found[0], found[1]


def _is_listed(values: Sequence[Any]) -> bool:
    return len(values) > 0 and isinstance(values[0], list | tuple)


def _tagged(table: Table, words_in: str, tags_in: str) -> tuple[list[list[str]], list[list[str]]]:
    """Returns words and tags of every row, both checked."""
    names = (table.class_names or {}).get(tags_in)
    words, tags = [], []
    for row, (said, marks) in enumerate(zip(table.columns[words_in], table.columns[tags_in], strict=True)):
        if not isinstance(said, list | tuple) or not isinstance(marks, list | tuple) or len(said) != len(marks) or not said:
            counts = [len(part) if isinstance(part, list | tuple) else 0 for part in (said, marks)]
            raise ValueError(f"{table.where(row)}: {counts[0]} words, but {counts[1]} tags: there must be one for each word.")
        named = [names[mark] if names and isinstance(mark, int) else str(mark) for mark in marks]
        before = OUTSIDE
        for place, (word, tag) in enumerate(zip(said, named, strict=True)):
            if not isinstance(word, str) or not word.strip():
                raise ValueError(f"{_where(table, row, place)}: a word must be text, got {word!r}.")
            _check_tag(tag, before, table, row, place)
            before = tag
        words.append(list(said))
        tags.append(named)
    return words, tags


def _check_tag(tag: str, before: str, table: Table, row: int, place: int) -> None:
    if tag != OUTSIDE and not _TAG.fullmatch(tag):
        raise ValueError(
            f"{_where(table, row, place)}: tag {tag!r} is outside BIO, which has O, B-TYPE (an entity begins) and I-TYPE (it "
            "goes on): rewrite the tags, S- as B- and E- as I-."
        )
    if tag.startswith("I") and before[1:] != tag[1:]:
        raise ValueError(
            f"{_where(table, row, place)}: tag {tag!r} goes on with an entity that has not begun (after {before!r}): write "
            f"{'B' + tag[1:]!r} where one begins."
        )


def _where(table: Table, row: int, place: int) -> str:
    """Names a word: by its line in a CoNLL file, else by row and place."""
    lines: Mapping[int, Sequence[int]] | Sequence[Any] | None = table.word_lines
    return f"{table.source}, line {lines[row][place]}" if lines else f"{table.where(row)}, word {place} (counted from 0)"


def _in_order(tags: Sequence[Sequence[str]], model_names: tuple[str, ...]) -> tuple[str, ...]:
    """The tags in the model's order where it knows them all, else O, then B and I of each type by the alphabet."""
    seen = {tag for row in tags for tag in row} | {OUTSIDE}
    if seen <= {*model_names}:
        return model_names
    kinds = sorted({tag[1:] for tag in seen if tag != OUTSIDE})
    if not kinds:
        raise ValueError(f"All words of the training rows are tagged {OUTSIDE!r}: there must be at least one entity.")
    return (OUTSIDE, *(mark + kind for kind in kinds for mark in "BI"))
