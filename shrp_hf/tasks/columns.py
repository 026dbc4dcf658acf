"""Which columns hold the texts and the labels: named by the user, or by what such columns are usually called."""

from collections.abc import Sequence
from dataclasses import dataclass

from shrp_hf.tasks.kinds import KINDS

PAIR_COLUMNS = (
    ("premise", "hypothesis"),
    ("sentence1", "sentence2"),
    ("sentence_1", "sentence_2"),
    ("sentence_a", "sentence_b"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("query", "passage"),
    ("query", "document"),
    ("query", "positive"),
    ("anchor", "positive"),
    ("question", "answer"),
    ("text", "text_pair"),
    ("text1", "text2"),
    ("text_a", "text_b"),
)
TEXT_COLUMNS = ("text", "sentence", "review", "content", "document", "body", "message", "comment", "tweet", "utterance")
# What stands beside a longer text as often as alone.
SHORT_TEXT_COLUMNS = ("title", "headline", "summary", "description", "question", "query", "phrase")
LABEL_COLUMNS = ("label", "labels")
OTHER_LABEL_COLUMNS = (
    *("score", "target", "class", "category", "categories", "sentiment", "rating", "stars", "intent", "topic"),
    *("polarity", "emotion", "emotions", "tag", "tags"),
)


@dataclass(frozen=True)
class Reading:
    """How a data set is to be understood, where it does not say so itself.

    Args:
        text_column: Column of the text; None: found by its name. Case does not matter.
        text_pair_column: Column of the second text of a pair.
        label_column: Column of the label; several names separated by commas: a column of 0 and 1 for each label.
        task: Kind of the task, a name in `KINDS`; None: found from the labels.
        label_names: Labels in the order of the model that is to be judged (`label_names_of`), which wins over
            the alphabetical one; empty for a model without names.
        corpus: File or directory of texts without labels, which embeddings learn from.
        pairs: File of texts that belong together, such as questions and answers, on which a recovery of embeddings ends.

    Raises:
        ValueError: The kind is unknown, or a second text is named without a first.
    """

    text_column: str | None = None
    text_pair_column: str | None = None
    label_column: str | None = None
    task: str | None = None
    label_names: tuple[str, ...] = ()
    corpus: str | None = None
    pairs: str | None = None

    def __post_init__(self) -> None:
        if self.task is not None and self.task not in KINDS:
            raise ValueError(f"`task` must be one of {', '.join(KINDS)}, got {self.task!r}.")
        if self.text_pair_column is not None and self.text_column is None:
            raise ValueError(f"`text_pair_column` {self.text_pair_column!r} needs `text_column`, the first text: give both.")


@dataclass(frozen=True)
class Columns:
    """Where the texts and labels are.

    Args:
        texts: One column, or two for a pair.
        labels: One column, or one for each label.
    """

    texts: tuple[str, ...]
    labels: tuple[str, ...]

    def __str__(self) -> str:
        texts = f"text{'s' * (len(self.texts) > 1)} in {' + '.join(map(repr, self.texts))}"
        return f"{texts}, label{'s' * (len(self.labels) > 1)} in {', '.join(map(repr, self.labels))}"


def find_columns(columns: Sequence[str], reading: Reading) -> Columns:
    """Finds the columns of texts and labels.

    Args:
        columns: The names that there are.
        reading: What the user named.

    Raises:
        ValueError: A named column is not there, or none or several have a usual name.
    """
    if reading.label_column is not None:
        words = [word.strip() for word in reading.label_column.split(",") if word.strip()]
        # A single column may have a comma in its name.
        names = [reading.label_column] if len(_matches(columns, reading.label_column)) == 1 else words
        labels = tuple(_named(columns, name, "label_column") for name in names)
    else:
        labels = (_label_column(columns),)
    texts = _text_columns(columns, reading)
    twice = set(texts) & set(labels) or ({texts[0]} if len(set(texts)) < len(texts) else set())
    if twice or len(set(labels)) < len(labels):
        raise ValueError(f"each column can be one thing, got {Columns(texts, labels)}: name others of {list(columns)}.")
    return Columns(texts, labels)


def find_column(columns: Sequence[str], name: str) -> str | None:
    """Returns the column of this name, whatever its case; None where there is none or more than one."""
    found = _matches(columns, name)
    return found[0] if len(found) == 1 else None


def _matches(columns: Sequence[str], name: str) -> list[str]:
    if name in columns:
        return [name]
    return [column for column in columns if column.strip().casefold() == name.strip().casefold()]


def _named(columns: Sequence[str], name: str, argument: str) -> str:
    found = _matches(columns, name)
    if len(found) != 1:
        what = "which is not there" if not found else f"which could be any of {found}"
        raise ValueError(f"`{argument}` is {name!r}, {what}: name one of the columns {list(columns)}.{_no_header(columns)}")
    return found[0]


def _text_columns(columns: Sequence[str], reading: Reading) -> tuple[str, ...]:
    if reading.text_column is not None:
        given = {"text_column": reading.text_column, "text_pair_column": reading.text_pair_column}
        return tuple(_named(columns, name, argument) for argument, name in given.items() if name is not None)
    for pair in PAIR_COLUMNS:
        found = [find_column(columns, name) for name in pair]
        if all(found):
            return tuple(found)
    return (_usual(columns, (TEXT_COLUMNS, SHORT_TEXT_COLUMNS), "text", "`text_column` (`--text-column`)"),)


def _label_column(columns: Sequence[str]) -> str:
    return _usual(columns, (LABEL_COLUMNS, OTHER_LABEL_COLUMNS), "label", "`label_column` (`--label-column`)")


def _usual(columns: Sequence[str], tiers: Sequence[Sequence[str]], what: str, argument: str) -> str:
    """Returns the one column that has a usual name; those of a later tier count where none of an earlier is there."""
    for names in tiers:
        found = [column for name in names for column in _matches(columns, name)]
        if len(found) > 1:
            raise ValueError(f"{found} could each be the {what} column among {list(columns)}: name it with {argument}.")
        if found:
            return found[0]
    raise ValueError(
        f"no {what} column among {list(columns)}: name it with {argument}; it is found by itself where it is called "
        f"{', '.join(tiers[0])} or the like.{_no_header(columns)}"
    )


def _no_header(columns: Sequence[str]) -> str:
    looks_like_row = any(
        len(name.split()) > 3 or name.strip().lstrip("+-").replace(".", "", 1).isdecimal() for name in columns
    )
    return " The first line looks like a row: put a line with the names of the columns above it." if looks_like_row else ""
