"""The files that a comparison ends in, made from its cells alone."""

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shrp_hf.publishing.plots.drawing import DPI
from shrp_hf.publishing.record import source_name
from shrp_hf.publishing.report import write_text
from shrp_hf.workflows.compare.figures import write_figures
from shrp_hf.workflows.compare.speed import read_speed
from shrp_hf.workflows.compare.tables import (
    Cell,
    Row,
    csv_text,
    no_share,
    read_cells,
    routing_of,
    rows_of,
    table_of,
    table_page,
)

_STYLE = """body { font: 15px/1.5 system-ui, sans-serif; max-width: 80em; margin: 2em auto; padding: 0 1em; color: #222 }
p, ul { max-width: 60em } h2 { margin-top: 2em } img { max-width: 100% } figure { margin: 1.5em 0 }
figcaption { color: #555; font-size: 13px } .wide { overflow: auto; max-height: 85vh; border: 1px solid #ddd }
table { border-collapse: separate; border-spacing: 0; font-size: 13px; font-variant-numeric: tabular-nums }
td, th { padding: .25em .7em; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; background: #fff }
th { position: sticky; top: 0; z-index: 1 } td:nth-child(-n+2), th:nth-child(-n+2) { text-align: left }
td:first-child { position: sticky; left: 0 } tr:hover td { background: #eef3f8 }"""
_CAPTIONS = {
    "frontier": "Quality against measured throughput: up and to the right is better.",
    "retention": "Quality against the heads that stay; random is the control.",
    "heads": "Dark: every seed keeps the head. A method that finds the same heads each time has no half tones.",
}


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


def html_report(rows: Sequence[Row], headline: str, figures: Sequence[Path]) -> str:
    """Returns one page with everything in it: it opens without a network, and can be sent as a file."""
    cell: Cell = rows[0].cells[0] if rows else {}
    settings = cell.get("settings", {})
    task = html.escape(str(settings.get("task", "")))
    # The page is made to be sent: of a directory it tells two names, not where it lies.
    facts = settings | {"model": source_name(settings["model"])} if settings else {}
    titles, *lines = table_of(rows, headline)
    head = "".join(f"<th>{html.escape(title)}</th>" for title in titles)
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(text)}</td>' for text in line)}</tr>\n" for line in lines)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{task}: comparison</title>
<style>{_STYLE}</style></head><body>
<h1>{task}: what was compared, and what it cost</h1>
<p>Mean and 95% interval (Student's t) over seeds; one seed has no interval. Reported on {cell.get("rows", 0):,} rows
({html.escape(str(settings.get("reported", "")))}), which chose nothing. "Of dense" and "agreement" are against the
dense model of the same seed. Parameters in three conventions: a reduction of "encoder + pooler" is not one of the whole
model. "Examples" are those trained on after the dense model. {_timed(rows)}</p>
{"".join(map(_figure, figures))}
<h2>All results</h2>
<p>{html.escape(no_share(rows, headline))}</p>
<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>
{body}</tbody></table></div>
<h2>What holds for every cell</h2>{_facts({k: v for k, v in facts.items() if k != "recipe"} | cell.get("versions", {}))}
{"".join(f"<h2>Recipe {html.escape(name)}</h2>{_facts(recipe)}" for name, recipe in _recipes(rows).items())}
</body></html>
"""


def _figure(path: Path) -> str:
    caption = _CAPTIONS[path.stem.split("-")[0]]
    picture = path.read_bytes()
    # The width is in the PNG's header. In inches, letters have one size in all pictures.
    size = f"width: {int.from_bytes(picture[16:20]) / DPI:.2f}in"
    image = f'<img alt="{path.stem}" style="{size}" src="data:image/png;base64,{base64.b64encode(picture).decode()}">'
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>\n"


def _timed(rows: Sequence[Row]) -> str:
    speed = next((row.speed for row in rows if row.speed), None)
    if not speed:
        return "Speed was not measured."
    return (
        f"Throughput: {speed['batch_size']} x {speed['length']} tokens, {speed['num_threads']} threads, {speed['device']}, "
        f"one run, median over {speed['num_rounds']} rounds; heads spread evenly over the layers."
    )


def _facts(facts: Mapping[str, Any]) -> str:
    return f"<ul>{''.join(f'<li>{html.escape(name)}: {html.escape(str(value))}</li>' for name, value in facts.items())}</ul>"


def _recipes(rows: Sequence[Row]) -> dict[str, Mapping[str, Any]]:
    """The recipes by name; where routing was varied, each variant."""
    recipes: dict[str, Mapping[str, Any]] = {}
    for row in rows:
        recipe = row.cells[0]["settings"]["recipe"]
        if recipe:
            recipes.setdefault(f"{recipe['name']} ({routing_of(recipe)})", recipe)
    return recipes
