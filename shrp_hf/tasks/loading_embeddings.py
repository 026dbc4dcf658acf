"""Reads texts without labels, and what embeddings are judged on: scored pairs, or a collection in BEIR's layout."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from shrp_hf.tasks.columns import PAIR_COLUMNS, SHORT_TEXT_COLUMNS, TEXT_COLUMNS, Reading, find_column, find_columns
from shrp_hf.tasks.embeddings import AGREEMENT_METRICS, RETRIEVAL_METRICS, SIMILARITY_METRICS
from shrp_hf.tasks.files import SUFFIXES, Table, read_file, read_texts
from shrp_hf.tasks.kinds import EMBEDDINGS
from shrp_hf.tasks.labels import as_number
from shrp_hf.tasks.sources import canonical, find_source, places
from shrp_hf.tasks.splits import MOST_REPORTED, REPORTED_SHARE, Sizes, cut_by_text, sample
from shrp_hf.tasks.task import Task

CORPUS, QUERIES, QRELS = "corpus.jsonl", "queries.jsonl", "qrels"
_REPORTED_QRELS = ("test.tsv", "dev.tsv")
_QRELS_HEADER = ("query-id", "corpus-id", "score")


def is_beir(name: str, data_dir: str | Path | None) -> bool:
    """Whether a name, or its folder in `data_dir`, is a directory in BEIR's layout."""
    folder = _folder(name, data_dir)
    return folder is not None and all((folder / part).exists() for part in (CORPUS, QUERIES, QRELS))


def load_embeddings(name: str | None, data_dir: str | Path | None, reading: Reading, sizes: Sizes) -> Task:
    """Builds a task of embeddings.

    It learns on the texts of `reading.corpus`; without it, on those of the collection that it is judged on, whose queries
    and judgements it does not look at. A tenth of the texts, at most `max_validation`, is held out to choose on. What is
    judged by people is reported; without such rows a fifth of the texts is set aside, and judged by the dense model.

    Args:
        name: A directory in BEIR's layout, or pairs of texts with a score, as `find_source` takes them; None: neither.
        data_dir: Directory that holds it.
        reading: The corpus, and which columns hold texts and scores.
        sizes: How many rows are taken.

    Raises:
        ValueError: There is no corpus, or it holds no text; a judgement names no document or query; a query has none; or a
            score is no number: names file and line, or row.
    """
    folder = _folder(name, data_dir) if name is not None and is_beir(name, data_dir) else None
    if reading.corpus is not None:
        texts, title = _corpus(Path(reading.corpus).expanduser(), reading), Path(reading.corpus).name
    elif folder is not None:
        texts, title = _documents(folder / CORPUS)[1], f"{folder.name}, {CORPUS}"
    else:
        raise ValueError("Embeddings learn from texts: give `--corpus FILE` (`corpus` of `Reading`), labels are not needed.")
    empty = sum(not text for text in texts)
    texts = list(dict.fromkeys(text for text in texts if text))
    least = 5 if name is None else 3  # two to hold out, two to report on where nothing else is, one to learn from
    if len(texts) < least:
        raise ValueError(f"{title} must hold at least {least} different texts, got {len(texts)}.")
    notes = [f"{len(texts):,} different texts of {title}" + (f", {empty} empty ones left out" if empty else "")]
    metrics: tuple[str, ...] = AGREEMENT_METRICS
    if folder is not None:
        test, reported, more = _collection(folder)
        metrics = RETRIEVAL_METRICS
    elif name is not None:
        test, reported, more = _pairs(name, data_dir, reading)
        metrics = SIMILARITY_METRICS
    else:
        kept, chosen = cut_by_text(texts, min(MOST_REPORTED, max(2, len(texts) // REPORTED_SHARE)), seed=0)
        test, reported = Dataset.from_dict({"text": [texts[row] for row in chosen]}), f"{title}, texts set aside"
        texts, more = [texts[row] for row in kept], ["no judgements came along: the dense model's own similarities judge"]
    if reading.corpus is not None:
        texts, left_out = _without(texts, test)
        more += left_out
    pairs = None
    if reading.pairs is not None:
        pairs, left_out = _partners(Path(reading.pairs).expanduser(), test)
        more += left_out
    kept, chosen = cut_by_text(texts, min(sizes.max_validation, max(2, len(texts) // 10)), sizes.seed)
    train = [texts[row] for row in sample(kept, sizes.max_train, sizes.seed)]
    return Task(
        name=Path(name).name if name else Path(str(reading.corpus)).stem,
        train=Dataset.from_dict({"text": train}),
        validation=Dataset.from_dict({"text": [texts[row] for row in chosen]}),
        test=test,
        label_names=(),
        metric_names=metrics,
        reported=reported,
        kind_name=EMBEDDINGS.name,
        notes=(*notes, *more),
        pairs=pairs,
    )


def _without(texts: list[str], test: Dataset) -> tuple[list[str], list[str]]:
    """Drops the texts that are reported on."""
    judged = _reported(test)
    fresh = [text for text in texts if text not in judged]
    if len(fresh) == len(texts):
        return texts, []
    if len(fresh) < 3:
        raise ValueError(
            f"All but {len(fresh)} texts of `corpus` are also those that are reported on: give others to learn from."
        )
    return fresh, [f"{len(texts) - len(fresh):,} texts of the corpus are also judged ones and were left out"]


def _reported(test: Dataset) -> set[str]:
    """The texts that are reported on: pairs, and queries; documents are what a collection is given to be searched."""
    roles = test["role"] if "role" in test.column_names else [""] * len(test)
    return {text for text, role in zip(test["text"], roles, strict=True) if role != "document"}


def _partners(path: Path, test: Dataset) -> tuple[Dataset, list[str]]:
    """Texts that belong together, each pair once, those that are reported on left out."""
    if not path.is_file():
        raise ValueError(f"`pairs` {str(path)!r} is no file.")
    table = read_file(path, raw_quotes=True)
    names = list(table.columns)
    columns = next((found for pair in PAIR_COLUMNS if all(found := [find_column(names, name) for name in pair])), None)
    if columns is None:
        raise ValueError(f"{table.source} must have two columns of texts, such as anchor and positive, got {names}.")
    for column in columns:
        wrong = [row for row, text in enumerate(table.columns[column]) if not (isinstance(text, str) and text.strip())]
        if wrong:
            raise ValueError(f"{places(table, wrong)}: column {column!r} must hold text in every row.")
    reported = _reported(test)
    whole = list(dict.fromkeys(zip(*(table.columns[column] for column in columns), strict=True)))
    fresh = [pair for pair in whole if not reported & {*pair}]
    if len(fresh) < 2:
        raise ValueError(f"{table.source} must hold at least 2 different pairs that are not reported on, got {len(fresh)}.")
    first, second = zip(*fresh, strict=True)
    left_out = f", {len(whole) - len(fresh):,} that are reported on left out" if len(fresh) < len(whole) else ""
    rows = Dataset.from_dict({"text": list(first), "text_pair": list(second)})
    return rows, [f"{len(fresh):,} pairs of {path.name} end a recovery{left_out}"]


def _folder(name: str, data_dir: str | Path | None) -> Path | None:
    if data_dir is None:
        path = Path(name).expanduser()
        return path if name and path.is_dir() else None
    root = Path(data_dir).expanduser()
    folders = [path for path in root.iterdir() if path.is_dir()] if root.is_dir() else []
    return next((folder for folder in sorted(folders) if canonical(folder.name) == canonical(name)), None)


# --- the corpus ---


def _corpus(path: Path, reading: Reading) -> list[str]:
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in (*SUFFIXES, ".txt") and file.is_file())
        if not files:
            raise ValueError(f"`corpus` {str(path)!r} holds no file that ends in one of {', '.join((*SUFFIXES, '.txt'))}.")
        return [text for file in files for text in _corpus(file, reading)]
    if not path.is_file():
        raise ValueError(f"`corpus` {str(path)!r} is no file or directory.")
    if path.suffix.lower() == ".txt":
        return read_texts(path)
    table = read_file(path, raw_quotes=True)
    names = list(table.columns)
    usual = (reading.text_column,) if reading.text_column else (*TEXT_COLUMNS, *SHORT_TEXT_COLUMNS)
    column = next(filter(None, (find_column(names, name) for name in usual)), None)
    if column is None:
        raise ValueError(f"{table.source} has no column of texts among {names}: name it with `--text-column`.")
    title = find_column(names, "title") if reading.text_column is None else None
    return _texts(table, column, title if title != column else None)


def _texts(table: Table, column: str, title: str | None) -> list[str]:
    """Texts, each behind its title where there is one, as BEIR joins them; "" where a row has none, as some of BEIR's have."""
    found = []
    for row, text in enumerate(table.columns[column]):
        head = table.columns[title][row] if title else None
        if text is not None and not isinstance(text, str):
            raise ValueError(f"{table.where(row)}: column {column!r} must hold text in every row, got {text!r}.")
        found.append(" ".join(part.strip() for part in (head, text) if isinstance(part, str) and part.strip()))
    if not any(found):
        raise ValueError(f"{table.source}: no row holds text in column {column!r}.")
    return found


# --- what judges ---


def _pairs(name: str, data_dir: str | Path | None, reading: Reading) -> tuple[Dataset, str, list[str]]:
    """Pairs of texts with a score, two rows a pair."""
    source = find_source(name, data_dir)
    split = next((split for split in ("test", "validation") if _is_scored(source.tables.get(split), reading)), "train")
    table = source.tables[split]
    columns = find_columns(list(table.columns), reading)
    if len(columns.texts) != 2:
        raise ValueError(
            f"{table.source} must hold pairs of texts with a score, or be a directory in BEIR's layout ({CORPUS}, {QUERIES}, "
            f"{QRELS}): it has {list(table.columns)}."
        )
    sides = [list(table.columns[column]) for column in columns.texts]
    texts, judged = [], []
    for row, label in enumerate(table.columns[columns.labels[0]]):
        score = as_number(label)
        if score is None or not abs(score) < float("inf"):
            raise ValueError(f"{table.where(row)}: a pair must have a number for a score, got {label!r}.")
        for side in sides:
            if not isinstance(side[row], str) or not side[row].strip():
                raise ValueError(f"{table.where(row)}: both columns of a pair must hold text, got {side[row]!r}.")
            texts.append(side[row])
            judged.append({"pair": row, "score": float(score)})
    rows = Dataset.from_dict({"text": texts, "role": [""] * len(texts), "judged": judged})
    return rows, f"{source.title}, {split}", [f"{len(judged) // 2:,} pairs judge: {columns} of {source.title}"]


def _is_scored(table: Table | None, reading: Reading) -> bool:
    if table is None:
        return False
    column = find_columns(list(table.columns), reading).labels[0]
    return any(as_number(label) not in (None, -1) for label in table.columns[column])


def _documents(path: Path) -> tuple[list[str], list[str]]:
    """Ids and texts of a file of BEIR."""
    table = read_file(path)
    missing = [column for column in ("_id", "text") if column not in table.columns]
    if missing:
        raise ValueError(f"{table.source} must have `_id` and `text` on each line, and {missing[0]!r} is missing.")
    ids = [str(found) for found in table.columns["_id"]]
    seen: dict[str, int] = {}
    for row, found in enumerate(ids):
        if seen.setdefault(found, row) != row:
            raise ValueError(f"{table.where(row)}: the id {found!r} is that of another line too ({table.where(seen[found])}).")
    return ids, _texts(table, "text", "title" if "title" in table.columns else None)


def _collection(folder: Path) -> tuple[Dataset, str, list[str]]:
    """Documents, then the queries that are judged, in BEIR's layout."""
    (document_ids, documents), (query_ids, queries) = _documents(folder / CORPUS), _documents(folder / QUERIES)
    files = {path.name: path for path in sorted((folder / QRELS).glob("*.tsv"))}
    name = next((name for name in _REPORTED_QRELS if name in files), None)
    if name is None:
        raise ValueError(f"Directory {str(folder / QRELS)!r} must hold {' or '.join(_REPORTED_QRELS)}, got {sorted(files)}.")
    place = {found: row for row, found in enumerate(document_ids)}
    known = {*query_ids}
    judgements = {file: _qrels(path, place, known) for file, path in files.items()}
    unjudged = [row for row, found in enumerate(query_ids) if not any(found in rows for rows in judgements.values())]
    if unjudged:
        table = read_file(folder / QUERIES)
        raise ValueError(
            f"{table.where(unjudged[0])}: query {query_ids[unjudged[0]]!r} has no judgement in {QRELS} ({len(unjudged)} have "
            "none): add them, or remove the queries."
        )
    chosen = [row for row, found in enumerate(query_ids) if found in judgements[name]]
    judged: list[dict[str, Any]] = [{"relevant": None, "grades": None}] * len(documents)
    for row in chosen:
        found = judgements[name][query_ids[row]]
        judged.append({"relevant": list(found), "grades": list(found.values())})
    rows = Dataset.from_dict(
        {
            "text": [*documents, *(queries[row] for row in chosen)],
            "role": ["document"] * len(documents) + ["query"] * len(chosen),
            "judged": judged,
        }
    )
    return rows, f"{folder.name}, {name}", [f"{len(chosen):,} queries over {len(documents):,} documents judge"]


def _qrels(path: Path, place: dict[str, int], queries: set[str]) -> dict[str, dict[int, int]]:
    """Query -> row of a document -> grade."""
    found: dict[str, dict[int, int]] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for line, fields in enumerate(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE), start=1):
            if not fields or (line == 1 and _is_header(fields)):
                continue
            query, document, grade = (*fields, "", "", "")[:3]
            value = as_number(grade)
            where = f"File {str(path)!r}, line {line}"
            if not isinstance(value, int):
                raise ValueError(f"{where}: expected {', '.join(_QRELS_HEADER)} divided by tabs, got {fields}.")
            if document not in place:
                raise ValueError(f"{where}: document {document!r} is not in {CORPUS}: add it, or remove the line.")
            if query not in queries:
                raise ValueError(f"{where}: query {query!r} is not in {QUERIES}: add it, or remove the line.")
            found.setdefault(query, {})[place[document]] = value
    return found


def _is_header(fields: Sequence[str]) -> bool:
    return as_number(fields[-1]) is None
