"""What the labels of a data set mean: its kind of task, its classes, and the value of each label."""

import ast
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from shrp_hf.tasks.kinds import CLASSIFICATION, LABEL_KINDS, MULTILABEL, REGRESSION, LabelKind

UNLABELLED = -1
"""How GLUE marks the rows of its hidden test sets, and `datasets` those without a class. Elsewhere it is a class."""
_GENERIC = re.compile(r"LABEL_\d+")
_MOST_SHOWN = 8
_FEW_CLASSES = 20


@dataclass(frozen=True)
class Labels:
    """How raw labels become values.

    Args:
        kind: The kind of task.
        names: One name per class; empty for regression.
        indices: What raw whole numbers (or places in a row of 0 and 1) mean: position in the model's output; empty
            where they are names themselves.
        range: Lowest and highest value of a regression label.
        is_multi_hot: Whether a row of several labels is a 0 or 1 for each, rather than a list of those it has.
    """

    kind: LabelKind
    names: tuple[str, ...]
    indices: tuple[int, ...] = ()
    range: tuple[float, float] = (-math.inf, math.inf)
    is_multi_hot: bool = False
    _index: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        folded = {name.casefold(): index for index, name in enumerate(self.names)}
        # Names that differ only in case are told apart; otherwise case does not matter.
        exact = {name: index for index, name in enumerate(self.names)}
        object.__setattr__(self, "_index", (folded if len(folded) == len(self.names) else {}) | exact)

    def parse(self, label: Any) -> int | float | list[float]:
        """Turns a raw label into a class index, a number, or a 0 or 1 for each label.

        Raises:
            ValueError: It is none of the classes, or no number within the range.
        """
        if self.kind is REGRESSION:
            return self._number(label)
        if self.kind is CLASSIFICATION:
            return self._class(label)
        chosen = [0.0] * len(self.names)
        for index in self._classes(label):
            chosen[index] = 1.0
        return chosen

    def _number(self, label: Any) -> float:
        low, high = self.range
        value = as_number(label)
        if value is None or not (math.isfinite(value) and low <= value <= high):
            span = "a number" if math.isinf(low) and math.isinf(high) else f"a number from {low} to {high}"
            raise ValueError(f"label {label!r} is out of range: it must be {span}.")
        return float(value)

    def _class(self, label: Any) -> int:
        word = as_word(label)
        index = self._index.get(word, self._index.get(word.casefold()))
        if index is not None:
            return index
        if self.indices:
            value = as_number(label)
            if value is not None and float(value).is_integer() and 0 <= value < len(self.indices):
                return self.indices[int(value)]
            last = len(self.indices) - 1
            raise ValueError(f"label {label!r} is out of range: indices go from 0 to {last}, names: {shown(self.names)}.")
        raise ValueError(
            f"label {label!r} is none of the {len(self.names)} classes of the training rows ({shown(self.names)}): correct "
            "it, or add rows of that class to the training set."
        )

    def _classes(self, label: Any) -> list[int]:
        items = as_items(label)
        if not self.is_multi_hot:
            return [self._class(item) for item in items]
        if not _is_multi_hot(items, len(self.indices)):
            raise ValueError(f"labels {items} must be a 0 or 1 for each of {shown(self.names)}.")
        return [index for index, item in zip(self.indices, items, strict=True) if _flag(item)]


def is_missing(label: Any) -> bool:
    """Whether a raw label is none: nothing, an empty field, or NaN as data frames write it."""
    if isinstance(label, float):
        return math.isnan(label)
    return label is None or (isinstance(label, str) and not label.strip())


def as_number(label: Any) -> int | float | None:
    """Returns the number that a raw label is or spells; None for anything else."""
    if isinstance(label, bool):
        return int(label)
    if isinstance(label, int | float):
        return label
    if not isinstance(label, str):
        return None
    text = label.strip()
    try:
        # "007" and "1_000" are names.
        return int(text) if str(int(text)) == text.removeprefix("+") else None
    except ValueError:
        pass
    try:
        return float(text) if "_" not in text else None
    except ValueError:
        return None


def as_word(label: Any) -> str:
    """Returns the name of a raw label: 1, 1.0 and "1" are one class."""
    if isinstance(label, float) and label.is_integer():
        return str(int(label))
    if isinstance(label, str):
        value = as_number(label)
        return str(int(value)) if isinstance(value, float) and value.is_integer() else label.strip()
    return str(label)


def as_items(label: Any) -> list[Any]:
    """Returns the labels of a row with several: a list, the text of one, or words separated by |, ; or commas."""
    if not isinstance(label, str):
        return list(label) if isinstance(label, list | tuple | set) else [label]
    text = label.strip()
    if text.startswith("["):
        try:
            return list(ast.literal_eval(text))
        except (ValueError, SyntaxError) as error:
            raise ValueError(f"label {label!r} begins like a list but is none.") from error
    separator = next((mark for mark in "|;," if mark in text), "|")
    return [word.strip() for word in text.split(separator) if word.strip()]


def understand(raw: Sequence[Any], task: str | None, class_names: tuple[str, ...] = ()) -> Labels:
    """Finds out what labels mean that no table describes.

    Args:
        raw: The labels of the training rows, none of them missing.
        task: The kind of task, where the user gave it.
        class_names: Names whose indices the labels are, where the data set has them.

    Returns:
        The labels; classes in the order of `class_names`, else of the numbers or the alphabet.

    Raises:
        ValueError: The kind is not sure, there is one class only, or nearly as many as rows.
    """
    holds_lists = any(isinstance(label, list | tuple) for label in raw)
    kind = LABEL_KINDS[task] if task else MULTILABEL if holds_lists else None
    if holds_lists and kind is not MULTILABEL:
        raise ValueError(f"the labels are lists, which `--task {task}` does not have: leave it out, or give multilabel.")
    numbers = [] if holds_lists else [as_number(label) for label in raw if not isinstance(label, bool)]
    are_numbers = bool(numbers) and len(numbers) == len(raw) and None not in numbers
    if kind is None:
        kind = CLASSIFICATION if class_names or not are_numbers else _kind_of_numbers(numbers)
    if kind is REGRESSION:
        return Labels(kind, ())
    if class_names:
        return Labels(kind, class_names, tuple(range(len(class_names))))
    if kind is MULTILABEL:
        return _label_set([as_items(label) for label in raw])
    words = {as_word(label) for label in raw}
    if len(words) < 2:
        raise ValueError(f"all {len(raw)} training rows have the label {words.pop()!r}: there must be at least two classes.")
    if task is None and len(words) > max(_FEW_CLASSES, len(raw) / 2):
        what = "numbers or classes (`--task regression` or `--task classification` says which)" if are_numbers else "classes"
        raise ValueError(
            f"{len(words)} different labels in {len(raw)} rows are hardly {what}: name the right column with "
            "`--label-column`, or give `--task`."
        )
    return Labels(kind, tuple(sorted(words, key=_numbers_first)))


def in_order_of(labels: Labels, model_names: tuple[str, ...]) -> Labels:
    """Puts classes into the order in which a model has them, where its names or indices are those of the data.

    Args:
        labels: Of the data set.
        model_names: Names of the model's labels, from its config.
    """
    if labels.kind is REGRESSION or not model_names:
        return labels
    theirs = {name.casefold(): index for index, name in enumerate(model_names)}
    if len(theirs) == len(model_names) and {name.casefold() for name in labels.names} <= set(theirs):
        indices = tuple(theirs[labels.names[index].casefold()] for index in labels.indices)
        own = {name.casefold(): name for name in labels.names}
        names = tuple(own.get(name.casefold(), name) for name in model_names)
        return Labels(labels.kind, names, indices, is_multi_hot=labels.is_multi_hot)
    is_index = not labels.indices and all(name.isdecimal() and int(name) < len(model_names) for name in labels.names)
    if not is_index:
        return labels
    generic = all(_GENERIC.fullmatch(name) for name in model_names)
    names = tuple(map(str, range(len(model_names)))) if generic else model_names
    return Labels(labels.kind, names, tuple(range(len(model_names))))


def label_names_of(model_name: str) -> tuple[str, ...]:
    """Returns the names of a fine-tuned classifier's labels, in its order; empty for one without a trained head.

    Args:
        model_name: Hub id or directory; only its config is read.
    """
    from transformers import AutoConfig

    config: Any = AutoConfig.from_pretrained(model_name)
    heads = ("ForSequenceClassification", "ForTokenClassification")
    if not any(name.endswith(heads) for name in config.architectures or ()):
        return ()
    return tuple(str(config.id2label[index]) for index in range(config.num_labels)) if config.num_labels > 1 else ()


def shown(names: Sequence[str]) -> str:
    """Lists names, the first few where there are many."""
    more = f" and {len(names) - _MOST_SHOWN} more" if len(names) > _MOST_SHOWN else ""
    return ", ".join(names[:_MOST_SHOWN]) + more


def _kind_of_numbers(numbers: list[Any]) -> LabelKind:
    if all(isinstance(number, int) for number in numbers):
        return CLASSIFICATION
    if all(float(number).is_integer() for number in numbers):
        some = ", ".join(map(str, sorted(set(map(float, numbers)))[:5]))
        raise ValueError(
            f"labels such as {some} can be classes or numbers to predict: say which with `--task classification` or "
            "`--task regression` (`task` of `Reading`)."
        )
    return REGRESSION


def _label_set(rows: list[list[Any]]) -> Labels:
    width = len(rows[0])
    # A list of indices names each once, so one that repeats a value holds a 0 or 1 for each label.
    repeats = any(len({*map(as_word, row)}) < len(row) for row in rows)
    if width > 1 and repeats and all(_is_multi_hot(row, width) for row in rows):
        return Labels(MULTILABEL, tuple(map(str, range(width))), tuple(range(width)), is_multi_hot=True)
    words = {as_word(item) for row in rows for item in row}
    if len(words) < 2:
        raise ValueError(f"there must be at least two different labels, got {sorted(words)}.")
    return Labels(MULTILABEL, tuple(sorted(words, key=_numbers_first)))


def _is_multi_hot(items: Sequence[Any], count: int) -> bool:
    return len(items) == count and all(_flag(item) is not None for item in items)


def _flag(item: Any) -> bool | None:
    """Reads a 0 or 1, however it is written; None for anything else."""
    word = as_word(item).casefold()
    return {"0": False, "false": False, "1": True, "true": True}.get(word)


def _numbers_first(word: str) -> tuple[int, float, str]:
    value = as_number(word)
    return (0, float(value), word) if value is not None and math.isfinite(value) else (1, 0.0, word)
