"""The files that a comparison ends in, made from its cells alone."""

from pathlib import Path

from shrp_hf.publishing.report import write_text
from shrp_hf.workflows.compare.figures import write_figures
from shrp_hf.workflows.compare.page import html_report
from shrp_hf.workflows.compare.speed import read_speed
from shrp_hf.workflows.compare.tables import csv_text, read_cells, rows_of, table_page


def write_results(output: Path) -> list[Path]:
    """Writes `cells.csv`, `table.md`, the figures and `report.html` from all cells in the directory; returns their paths.

    Raises:
        ValueError: There is no cell.
        ImportError: matplotlib is not installed.
    """
    cells = read_cells(output)
    if not cells:
        raise ValueError(f"`output` {str(output)!r} holds no cells: run the comparison first, without `report_only`.")
    headline = next(iter(cells[0]["metrics"]))
    timings = read_speed(output)
    rows = rows_of(cells, timings)
    written = {
        output / "cells.csv": csv_text(cells, timings),
        output / "table.md": table_page(rows, headline),
    }
    for path, text in written.items():
        write_text(path, text)
    figures = write_figures(output, rows, headline)
    report = output / "report.html"
    write_text(report, html_report(rows, headline, figures))
    return [*written, *figures, report]
