"""Tables for people."""

from collections.abc import Iterable, Sequence


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], num_texts: int = 1) -> str:
    """Writes a table in Markdown.

    Args:
        header: Titles of the columns.
        rows: A cell for each of them.
        num_texts: So many columns, the first, are aligned to the left; numbers follow, aligned to the right.
    """
    rule = ["---"] * num_texts + ["---:"] * (len(header) - num_texts)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows))
