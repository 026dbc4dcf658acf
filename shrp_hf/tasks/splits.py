"""Cutting the held-out rows, on which everything is chosen, from a training set without leaking one into the other."""

import random
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from datasets import Dataset

from shrp_hf.defaults import SEED

REPORTED_SHARE, MOST_REPORTED = 5, 2000  # where no test rows come along: a fifth, or so many


@dataclass(frozen=True)
class Sizes:
    """How many rows a task takes.

    Args:
        seed: Seed of the held-out cut and of the training sample.
        max_train: Most training rows; None takes all.
        max_validation: Most held-out rows.
    """

    seed: int = SEED
    max_train: int | None = None
    max_validation: int = 1000


@dataclass(frozen=True)
class Division:
    """Three splits that share nothing, and what is to be said of how they were cut.

    Args:
        train: Rows to learn from.
        validation: Rows held out of them.
        test: The reported rows.
        reported: Where the reported rows come from.
        notes: What was left out or set aside.
    """

    train: Dataset
    validation: Dataset
    test: Dataset
    reported: str
    notes: tuple[str, ...]


def divide(splits: Mapping[str, Dataset], key: Callable[[Dataset], list[str]], sizes: Sizes, title: str) -> Division:
    """Makes training, held-out and reported rows of what came along; rows of one key are on one side only.

    The rows that are reported are the test split, else the validation split, else a fifth of the training set, which does
    not depend on the seed. Held out is the validation split where there is a test split too, else a tenth of the training
    rows.

    Args:
        splits: "train", and perhaps "validation" and "test".
        key: Returns for each row what it shares with others: its text, its query.
        sizes: How many rows are taken.
        title: What messages call the rows.

    Raises:
        ValueError: There are too few rows to hold any out.
    """
    train, notes = splits["train"], []
    named = next((split for split in ("test", "validation") if split in splits), None)
    if named is None:
        kept, chosen = cut_by_text(key(train), min(MOST_REPORTED, max(1, len(train) // REPORTED_SHARE)), seed=0)
        notes.append(
            f"no test rows came along: {len(chosen):,} of {len(train):,} were set aside to report on, the same ones for "
            "every seed"
        )
        test, train, reported = train.select(chosen), train.select(kept), f"{title}, rows set aside"
    else:
        test, reported = splits[named], f"{title}, {named}"

    def without(rows: Dataset, others: Dataset, own: str, role: str) -> Dataset:
        taken = set(key(others))
        kept = [row for row, found in enumerate(key(rows)) if found not in taken]
        if len(kept) < len(rows):
            notes.append(f"{len(rows) - len(kept):,} {own} rows are also {role} ones and were left out")
        return rows.select(kept)

    train = without(train, test, "training", "reported")
    if named == "test" and "validation" in splits:
        validation = without(splits["validation"], test, "validation", "reported")
        if len(validation) > sizes.max_validation:
            validation = validation.select(_some_groups(key(validation), sizes.max_validation, sizes.seed))
        train = without(train, validation, "training", "held-out")
    else:
        kept, chosen = cut_by_text(key(train), min(sizes.max_validation, max(1, len(train) // 10)), sizes.seed)
        train, validation = train.select(kept), train.select(chosen)
    train = train.select(sample(range(len(train)), sizes.max_train, sizes.seed))
    return Division(train, validation, test, reported, tuple(notes))


def _some_groups(keys: Sequence[str], size: int, seed: int) -> list[int]:
    """Draws rows of whole keys, at most `size` of them, in their order; of a single larger key all."""
    groups: dict[str, list[int]] = {}
    for row, found in enumerate(keys):
        groups.setdefault(found, []).append(row)
    names = list(groups)
    random.Random(seed).shuffle(names)
    chosen: list[int] = list(groups[names[0]])
    for name in names[1:]:
        if len(chosen) + len(groups[name]) <= size:
            chosen += groups[name]
    return sorted(chosen)


def cut_by_text(texts: Sequence[str], size: int, seed: int) -> tuple[list[int], list[int]]:
    """Cuts held-out rows so that a text is on one side only.

    Rows of one text stay together, because pair tasks repeat it with several partners (a premise of MNLI has three
    hypotheses).

    Args:
        texts: First text of each row.
        size: Most rows to hold out.
        seed: Seed of the draw.

    Returns:
        Row indices to train on and row indices held out, both ascending.

    Raises:
        ValueError: No text can be held out while another one stays.
    """
    rows: dict[str, list[int]] = {}
    for row, text in enumerate(texts):
        rows.setdefault(text, []).append(row)
    groups = list(rows.values())
    random.Random(seed).shuffle(groups)
    held_out: list[int] = []
    for group in groups[1:]:
        if len(held_out) + len(group) <= size:
            held_out.extend(group)
    return _sides(range(len(texts)), held_out)


def cut_stratified(texts: Sequence[str], strata: Sequence[Hashable], size: int, seed: int) -> tuple[list[int], list[int]]:
    """Cuts held-out rows so that a text is on one side only and each stratum gives about the same share of its rows.

    Args:
        texts: First text of each row.
        strata: Class of each row, or whatever is to be divided evenly; a text goes by its first row.
        size: Rows to hold out, about.
        seed: Seed of the draw.

    Returns:
        Row indices to keep and row indices held out, both ascending; the last text of a stratum is kept.

    Raises:
        ValueError: No text can be held out while another one stays.
    """
    rows: dict[str, list[int]] = {}
    for row, text in enumerate(texts):
        rows.setdefault(text, []).append(row)
    groups: dict[Hashable, list[list[int]]] = {}
    for group in rows.values():
        groups.setdefault(strata[group[0]], []).append(group)
    share, held_out, owed = size / max(1, len(texts)), [], 0.0
    generator = random.Random(seed)
    for members in sorted(groups.values(), key=len):
        generator.shuffle(members)
        # What is owed by rounding is taken from the next, larger stratum.
        owed += share * sum(map(len, members))
        for group in members[1:]:
            if len(group) <= owed + 0.5:
                held_out.extend(group)
                owed -= len(group)
    if len(rows) > 1 and all(len(members) == 1 for members in groups.values()):
        raise ValueError(
            f"no class has two texts, so none of {len(texts)} rows can be held out: add rows, or name the right column."
        )
    return _sides(range(len(texts)), held_out)


def cut_whole_sentences(texts: Sequence[str], size: int, seed: int) -> tuple[list[int], list[int]]:
    """Cuts held-out rows from a training set of phrases, as SST-2's is.

    Most rows of SST-2 are pieces of other rows, so a random cut repeats the training rows: TF-IDF scores 0.91 on it
    and 0.81 on the test set. Here whole sentences are held out and the rows that are pieces of them leave the
    training set, after which TF-IDF scores the same on both.

    Args:
        texts: Text of each row, words separated by spaces.
        size: Most rows to hold out.
        seed: Seed of the draw.

    Returns:
        Row indices to train on and row indices held out, both ascending; pieces of held-out rows are in neither.

    Raises:
        ValueError: No text can be held out while another one stays.
    """
    texts = [" ".join(text.split()) for text in texts]
    known = set(texts)
    pieces: set[str] = set()
    for text in known:
        pieces.update(known.intersection(_pieces(text)))
    whole = [row for row, text in enumerate(texts) if text not in pieces]
    train, held_out = cut_by_text([texts[row] for row in whole], size, seed)
    sentences = {texts[whole[row]] for row in held_out}
    dropped = sentences.union(*(known.intersection(_pieces(text)) for text in sentences))
    kept = [row for row, text in enumerate(texts) if text not in dropped]
    return kept, [whole[row] for row in held_out]


def sample(rows: Sequence[int], size: int | None, seed: int) -> list[int]:
    """Draws at most `size` of `rows`, in their order; None takes all."""
    if size is None or size >= len(rows):
        return list(rows)
    return sorted(random.Random(seed).sample(list(rows), size))


def _pieces(text: str) -> Iterator[str]:
    """Yields every run of words of `text` that is shorter than it."""
    words = text.split()
    for start in range(len(words)):
        for end in range(start + 1, len(words) + 1):
            if end - start < len(words):
                yield " ".join(words[start:end])


def _sides(rows: range, held_out: list[int]) -> tuple[list[int], list[int]]:
    if not held_out:
        raise ValueError(
            f"`train` must hold at least two texts of which one can be held out, got {len(rows)} rows. Add training "
            "rows or raise `max_validation`."
        )
    gone = set(held_out)
    return [row for row in rows if row not in gone], sorted(held_out)
