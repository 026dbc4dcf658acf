"""Cutting the held-out rows, on which everything is chosen, from a training set without leaking one into the other."""

import random
from collections.abc import Hashable, Iterator, Sequence


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
