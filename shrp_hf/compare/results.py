"""The files that a comparison ends in, made from its cells alone."""

from pathlib import Path

from shrp_hf.compare.tables import csv_text, markdown_table, read_cells, rows_of
from shrp_hf.report import write_text


def write_results(output: Path) -> list[Path]:
    """Writes `cells.csv` and `table.md` from all cells in the directory; returns their paths.

    Raises:
        ValueError: There is no cell.
    """
    cells = read_cells(output)
    if not cells:
        raise ValueError(f"`output` {str(output)!r} holds no cells: run the comparison first, without `report_only`.")
    headline = next(iter(cells[0]["metrics"]))
    written = {
        output / "cells.csv": csv_text(cells),
        output / "table.md": markdown_table(rows_of(cells), headline),
    }
    for path, text in written.items():
        write_text(path, text)
    return list(written)
