"""The files that a comparison ends in, made from its cells alone."""

import base64
import html
from collections.abc import Sequence
from pathlib import Path

from shrp_hf.compare.speed import read_speed
from shrp_hf.compare.tables import Cell, Row, csv_text, markdown_table, read_cells, rows_of, table_of
from shrp_hf.plots import plot_frontier, plot_keep_rates, plot_quality_curve
from shrp_hf.report import write_text

_STYLE = """body { font: 15px/1.5 system-ui, sans-serif; max-width: 75em; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums }
td, th { padding: .25em .7em; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap }
td:nth-child(-n+2), th:nth-child(-n+2) { text-align: left } tr:hover { background: #f4f6f8 }
.wide { overflow-x: auto } img { max-width: 100% } figure { margin: 2em 0 }"""


def write_results(output: Path) -> list[Path]:
    """Writes `cells.csv`, `table.md`, the figures and `report.html` from all cells in the directory; returns their paths.

    Raises:
        ValueError: There is no cell.
        ImportError: matplotlib or scipy is not installed.
    """
    cells = read_cells(output)
    if not cells:
        raise ValueError(f"`output` {str(output)!r} holds no cells: run the comparison first, without `report_only`.")
    headline = next(iter(cells[0]["metrics"]))
    timings = read_speed(output)
    rows = rows_of(cells, timings)
    written = {
        output / "cells.csv": csv_text(cells, timings),
        output / "table.md": markdown_table(rows, headline),
    }
    for path, text in written.items():
        write_text(path, text)
    figures = write_figures(output, rows, headline)
    report = output / "report.html"
    write_text(report, html_report(rows, headline, figures))
    return [*written, *figures, report]


def write_figures(output: Path, rows: Sequence[Row], headline: str) -> list[Path]:
    """Draws the frontier (where speed was measured), quality against kept heads, and which heads stay."""
    dense = [row for row in rows if row.cells[0]["method"] == "dense"]
    if not dense:
        return []
    baseline = dense[0].over_seeds(lambda cell: cell["metrics"][headline]).mean
    frontier: dict[str, list[tuple[float, float, float, float]]] = {}
    retention: dict[str, list[tuple[float, float, float, float]]] = {}
    figures = []
    for row in rows:
        cell = row.cells[0]
        if cell["method"] == "dense":
            continue
        value = row.over_seeds(lambda cell: cell["metrics"][headline])
        bar = (value.mean, value.mean - (value.margin or 0), value.mean + (value.margin or 0))
        if row.speed:
            frontier.setdefault(row.series, []).append((row.speed["ratio"], *bar))
        if cell["method"] not in ("shrp", "truncate"):
            retention.setdefault(row.series, []).append((cell["num_heads"], *bar))
            if cell["recovery_epochs"] == 0:
                path = output / "figures" / f"heads-{cell['method']}-{cell['budget']}{cell['value']}.png"
                figures.append(plot_keep_rates(row.keep_rates(), path, f"{row.name}: which stay"))
    if retention:
        figures.insert(0, plot_quality_curve(retention, output / "figures" / "retention.png", baseline, headline))
    if frontier:
        figures.insert(0, plot_frontier(frontier, output / "figures" / "frontier.png", baseline, headline))
    return figures


def html_report(rows: Sequence[Row], headline: str, figures: Sequence[Path]) -> str:
    """Returns one page with everything in it: it opens without a network, and can be sent as a file."""
    cell: Cell = rows[0].cells[0] if rows else {}
    settings = cell.get("settings", {})
    titles, *lines = table_of(rows, headline)
    head = "".join(f"<th>{html.escape(title)}</th>" for title in titles)
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(text)}</td>' for text in line)}</tr>\n" for line in lines)
    facts = "".join(
        f"<li>{html.escape(name)}: {html.escape(str(value))}</li>" for name, value in settings.items() if name != "recipe"
    )
    pictures = "".join(
        f'<figure><img alt="{path.stem}" src="data:image/png;base64,{_encoded(path)}"></figure>\n' for path in figures
    )
    speed = next((row.speed for row in rows if row.speed), None)
    timed = ""
    if speed:
        timed = (
            f"<p>Throughput: {speed['batch_size']} x {speed['length']} tokens, {speed['num_threads']} threads, "
            f"{speed['device']}, one run, median over {speed['num_rounds']} rounds; heads spread evenly over the layers.</p>"
        )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(str(settings.get("task", "")))}: comparison</title>
<style>{_STYLE}</style></head><body>
<h1>{html.escape(str(settings.get("task", "")))}: what was compared, and what it cost</h1>
<p>Mean and 95% interval (Student's t) over seeds; one seed has no interval. Reported on {cell.get("rows", 0):,} rows
({html.escape(str(settings.get("reported", "")))}), which chose nothing. "Of dense" and "agreement" are against the
dense model of the same seed. Parameters in three conventions: a reduction of "encoder + pooler" is not one of the whole
model.</p>
{timed}
<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>
{body}</tbody></table></div>
{pictures}
<h2>What holds for every cell</h2><ul>{facts}</ul>
</body></html>
"""


def _encoded(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()
