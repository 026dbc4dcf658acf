"""Tables from files: CSV, TSV, JSON Lines, JSON, Parquet, CoNLL; what is wrong in one is named by file and line."""

import codecs
import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import pyarrow
import pyarrow.parquet
from datasets import ClassLabel, Dataset

DELIMITERS = {".csv": ",", ".tsv": "\t", ".tab": "\t"}
CONLL = (".conll", ".bio", ".iob2")
SUFFIXES = (*DELIMITERS, ".jsonl", ".ndjson", ".json", ".parquet", *CONLL)
"""Endings of the files that are read."""
_OTHER_DELIMITERS = (";", "\t", ",", "|")
_LONGEST_FIELD = 2**31 - 1  # the csv module stops at 131,072 characters otherwise, which a document may have
_DOUBLED_QUOTES = re.compile(r'"(?:[^"]|"")*""(?:[^"]|"")*"')


@dataclass(frozen=True, eq=False)
class Table:
    """Raw rows of one split.

    Args:
        columns: Name -> a value for each row.
        source: Where they come from, for messages.
        lines: Line of the file on which each row begins, from 1; None where rows have no lines.
        class_names: Columns whose values are indices of named classes -> the names.
        notes: What was noticed while reading.
        parts: The tables that it was joined from, for messages; empty for a single one.
        word_lines: Of a CoNLL file, the line of each word of each row.
    """

    columns: Mapping[str, Sequence[Any]]
    source: str
    lines: Sequence[int] | None = None
    class_names: Mapping[str, tuple[str, ...]] | None = None
    notes: tuple[str, ...] = ()
    parts: tuple["Table", ...] = ()
    word_lines: Sequence[Sequence[int]] | None = None

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    def where(self, row: int) -> str:
        """Names a row: its file and line, or its number."""
        for part in self.parts:
            if row < len(part):
                return part.where(row)
            row -= len(part)
        return f"{self.source}, " + (f"row {row} (counted from 0)" if self.lines is None else f"line {self.lines[row]}")

    @classmethod
    def of(cls, dataset: Dataset, source: str) -> Self:
        """Takes over a data set of `datasets`."""
        features = {name: getattr(feature, "feature", feature) for name, feature in dataset.features.items()}
        classes = {name: tuple(feature.names) for name, feature in features.items() if isinstance(feature, ClassLabel)}
        return cls({name: dataset[name] for name in dataset.column_names}, source, class_names=classes)

    @classmethod
    def joined(cls, tables: Sequence[Self], source: str) -> Self:
        """Puts tables of the same columns one behind the other.

        Raises:
            ValueError: Their columns differ.
        """
        if len(tables) == 1:
            return tables[0]
        first = list(tables[0].columns)
        for table in tables[1:]:
            if list(table.columns) != first:
                raise ValueError(f"{table.source} has the columns {list(table.columns)}, but {tables[0].source} has {first}.")
        columns = {name: [value for table in tables for value in table.columns[name]] for name in first}
        notes = tuple(dict.fromkeys(note for table in tables for note in table.notes))
        return cls(columns, source, class_names=tables[0].class_names, notes=notes, parts=tuple(tables))


def read_file(path: Path, raw_quotes: bool = False) -> Table:
    """Reads one file by its ending: one of `SUFFIXES`.

    Text is UTF-8, or UTF-16 with its mark. CSV has a header line and quotes as in RFC 4180; a file whose header
    has no comma is divided at its semicolons, tabs or bars. TSV files keep their quotes, as GLUE's do, unless the
    rows fit their header only when quoted or a field holds doubled quotes. A CoNLL file has a word on each line, its tag in
    the last column, and an empty line between sentences.

    Args:
        path: The file.
        raw_quotes: Quotes of a TSV file are always text.

    Raises:
        ValueError: The ending is unknown, or the file is empty, in another encoding, or has a row that does not
            fit.
    """
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _read_parquet(path)
    if suffix not in SUFFIXES:
        raise ValueError(f"File {str(path)!r} must end in one of {', '.join(SUFFIXES)}.")
    text, notes = _decoded(path)
    if suffix in CONLL:
        return _read_conll(text, path, notes)
    if suffix in DELIMITERS:
        return _read_lines(text, path, raw_quotes, notes)
    return _read_json(text, path, notes)


def read_texts(path: Path, option: str = "texts") -> list[str]:
    """Reads the lines of a text file, in UTF-8 or marked UTF-16; empty ones are left out.

    Args:
        path: The file.
        option: The option that gave it.

    Raises:
        ValueError: It is in another encoding, or no line holds text.
    """
    text, _ = _decoded(path)
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"`--{option} {path}` holds no text.")
    return lines


def _decoded(path: Path) -> tuple[str, tuple[str, ...]]:
    data = path.read_bytes()
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        try:
            return data.decode("utf-16"), (f"{path.name} is UTF-16",)
        except UnicodeDecodeError as error:
            raise ValueError(f"File {str(path)!r} begins as UTF-16 but is not: save it as UTF-8 ({error}).") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"File {str(path)!r}, line {line}: not UTF-8 (byte 0x{data[error.start]:02x}). Save it as UTF-8, for example "
            f"with `iconv -f latin1 -t utf-8`, or the encoding that it has in place of latin1."
        ) from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise ValueError(f"File {str(path)!r}, line {line}: a zero byte. Save the file as UTF-8; it may be UTF-16.")
    return text, ()


# --- lines with delimiters ---


def _read_lines(text: str, path: Path, raw_quotes: bool, notes: tuple[str, ...]) -> Table:
    expected = DELIMITERS[path.suffix.lower()]
    header = next(iter(text.splitlines()), "")
    delimiter = expected
    if expected not in header and not raw_quotes:
        delimiter = max(_OTHER_DELIMITERS, key=header.count) if any(map(header.count, _OTHER_DELIMITERS)) else expected
    if delimiter != expected:
        notes = (*notes, f"{path.name} is divided at {delimiter!r}")
    quoted = delimiter != "\t" or (not raw_quotes and _is_quoted(text))
    if quoted and delimiter == "\t":
        notes = (*notes, f"{path.name} has quoted fields")
    rows = list(_rows(text, path, delimiter, quoted))
    if len(rows) < 2:
        raise ValueError(f"File {str(path)!r} must hold a header and at least one row, got {len(rows)} lines.")
    (_, names), *rows = rows
    names = [name.strip() for name in names]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(f"File {str(path)!r} has several columns named {twice[0]!r} in {names}: rename all but one.")
    columns = {name: [row[index] for _, row in rows] for index, name in enumerate(names)}
    return Table(columns, f"File {str(path)!r}", [line for line, _ in rows], notes=notes)


def _rows(text: str, path: Path, delimiter: str, quoted: bool) -> Iterator[tuple[int, list[str]]]:
    """Yields the line on which each row begins, and its fields; empty lines are left out."""
    width, header = None, []
    for line, row in _parsed(text, path, delimiter, quoted):
        if not row or row == [""] and width != 1:
            continue
        if width is None:
            width, header = len(row), row
        if len(row) != width:
            way_out = f"put a field that holds {delimiter!r} into double quotes" if quoted else "remove tabs within fields"
            raise ValueError(
                f"File {str(path)!r}, line {line}: expected {width} fields ({header}), got {len(row)}. If the row is whole, "
                f"{way_out}."
            )
        yield line, row


def _parsed(text: str, path: Path, delimiter: str, quoted: bool) -> Iterator[tuple[int, list[str]]]:
    if not quoted:
        lines = text.split("\n")
        yield from ((number, line.rstrip("\r").split(delimiter)) for number, line in enumerate(lines, start=1))
        return
    with _long_fields():
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        line = 1
        while True:
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                raise ValueError(
                    f"File {str(path)!r}, line {line}: {error}. A field that holds a quote or a {delimiter!r} stands in "
                    "double quotes, and the quotes in it are doubled; JSON Lines need none of this."
                ) from error
            yield line, row
            line = reader.line_num + 1


@contextmanager
def _long_fields() -> Iterator[None]:
    limit = csv.field_size_limit(_LONGEST_FIELD)
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _is_quoted(text: str) -> bool:
    """Whether a tab-separated file has quoted fields, as spreadsheets and pandas write them, rather than raw ones."""
    if '"' not in text:
        return False
    lines = [line.rstrip("\r").split("\t") for line in text.split("\n") if line.strip()]
    fits_raw = len({len(fields) for fields in lines}) == 1
    with _long_fields():
        try:
            rows = list(csv.reader(io.StringIO(text, newline=""), delimiter="\t", strict=True))
        except csv.Error:
            return False
    if len({len(row) for row in rows if row}) != 1:
        return False
    return not fits_raw or any(_DOUBLED_QUOTES.fullmatch(field) for fields in lines for field in fields)


# --- words with tags ---


def _read_conll(text: str, path: Path, notes: tuple[str, ...]) -> Table:
    """Columns are divided by tabs, else by spaces; a sentence is a row, with lists of its `tokens` and `tags`."""
    tokens: list[list[str]] = []
    tags: list[list[str]] = []
    lines: list[list[int]] = []
    is_open = False
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.rstrip("\r")
        fields = line.split("\t") if "\t" in line else line.split()
        if not line.strip() or fields[0] == "-DOCSTART-":
            is_open = False
            continue
        if len(fields) < 2 or not fields[0].strip() or not fields[-1].strip():
            raise ValueError(
                f"File {str(path)!r}, line {number}: expected a word and its tag, divided by a tab or spaces, got {line!r}."
            )
        if not is_open:
            for part in (tokens, tags, lines):
                part.append([])
            is_open = True
        tokens[-1].append(fields[0])
        tags[-1].append(fields[-1].strip())
        lines[-1].append(number)
    if not tokens:
        raise ValueError(f"File {str(path)!r} must hold at least one sentence, got none.")
    begins = [row[0] for row in lines]
    return Table({"tokens": tokens, "tags": tags}, f"File {str(path)!r}", begins, notes=notes, word_lines=lines)


# --- JSON and Parquet ---


def _read_json(text: str, path: Path, notes: tuple[str, ...]) -> Table:
    rows: Iterable[tuple[int | None, Any]]
    if path.suffix.lower() == ".json" and not _is_json_lines(text):
        try:
            data = json.loads(text)
        except ValueError as error:
            raise ValueError(f"File {str(path)!r} is no JSON: {error}.") from error
        if isinstance(data, dict):
            lists = [value for value in data.values() if isinstance(value, list)]
            data = lists[0] if len(lists) == 1 else data
        if not isinstance(data, list):
            raise ValueError(f"File {str(path)!r} must hold a list of objects, or an object on each line.")
        rows = ((None, row) for row in data)
    else:
        rows = _json_lines(text, path)
    lines, records = [], []
    for number, (line, record) in enumerate(rows):
        if not isinstance(record, dict):
            where = f"line {line}" if line else f"row {number} (counted from 0)"
            raise ValueError(f'File {str(path)!r}, {where}: expected an object such as {{"text": ..., "label": ...}}.')
        lines.append(line)
        records.append(record)
    if not records:
        raise ValueError(f"File {str(path)!r} must hold at least one row, got none.")
    names = dict.fromkeys(str(name) for record in records for name in record)
    columns = {name: [record.get(name) for record in records] for name in names}
    return Table(columns, f"File {str(path)!r}", None if None in lines else lines, notes=notes)


def _is_json_lines(text: str) -> bool:
    lines = [line for line in text.split("\n") if line.strip()][:2]
    try:
        return len(lines) == 2 and all(isinstance(json.loads(line), dict) for line in lines)
    except ValueError:
        return False


def _json_lines(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except ValueError as error:
                raise ValueError(f"File {str(path)!r}, line {number}: no JSON ({error}).") from error


def _read_parquet(path: Path) -> Table:
    try:
        dataset = Dataset(pyarrow.parquet.read_table(path))
    except (pyarrow.ArrowInvalid, OSError, ValueError) as error:
        raise ValueError(f"File {str(path)!r} cannot be read as Parquet: {error}") from error
    if not len(dataset):
        raise ValueError(f"File {str(path)!r} must hold at least one row, got none.")
    return Table.of(dataset, f"File {str(path)!r}")
