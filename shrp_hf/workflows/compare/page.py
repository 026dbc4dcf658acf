"""`report.html` of a comparison: which model to ship and why, the frontier, all results, which heads stay, the settings."""

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shrp_hf.publishing.page import Point, facts, frontier, head_map, on_demand, page, sortable_table
from shrp_hf.publishing.record import source_name
from shrp_hf.workflows.compare.figures import series_names, title_of
from shrp_hf.workflows.compare.tables import Cell, Row, held_out_of, no_share, routing_of, table_of, training_of

KEPT = 0.98
"""Share of the dense model's held-out quality that a model must keep to be worth shipping."""


def html_report(rows: Sequence[Row], headline: str, figures: Sequence[Path] = ()) -> str:
    """Returns one page with everything in it: it opens without a network, and can be sent as a file.

    Args:
        rows: From `rows_of`.
        headline: Name of the metric that stands for the task.
        figures: What `write_figures` has drawn; its frontier stands in where plotly is not installed.
    """
    cell: Cell = rows[0].cells[0] if rows else {}
    settings = cell.get("settings", {})
    task = str(settings.get("task", ""))
    # The page is made to be sent: of a directory it tells two names, not where it lies.
    told = settings | {"model": source_name(settings["model"])} if settings else {}
    told.pop("recipe", None)
    titles, *lines = table_of(rows, headline)
    reported = html.escape(str(settings.get("reported", "")))
    about = f"""<p>Mean and 95% interval (Student's t) over seeds; one seed has no interval. Reported on
{cell.get("rows", 0):,} rows ({reported}), which chose nothing. "Of dense" and "agreement" are against the dense model of the
same seed. Parameters in three conventions: a reduction of "encoder + pooler" is not one of the whole model. "Examples" are
those trained on after the dense model. {_timed(rows)}</p>
"""
    kinds = {row.name: row for row in reversed(_smaller(rows))}  # a recovery chooses no heads: the first stands for all
    maps = "".join(on_demand(name, _map(kinds[name])) for name in reversed(kinds))
    sections = [
        _frontier(rows, headline, figures),
        about,
        f"<h2>All results</h2>\n<p>{html.escape(no_share(rows, headline))}</p>\n{sortable_table(titles, lines, 2)}",
        f"<h2>Which heads and neurons stay</h2>\n<p>Dark: every seed keeps the head. Bars: neurons.</p>\n{maps}",
        f"<h2>What holds for every cell</h2>{facts(told | cell.get('versions', {}))}\n",
        *(f"<h2>Recipe {html.escape(name)}</h2>{facts(recipe)}\n" for name, recipe in _recipes(rows).items()),
    ]
    return page(f"{task}: comparison", f"{task}: what was compared, and what it cost", answer(rows, headline), sections)


def answer(rows: Sequence[Row], headline: str) -> str:
    """Returns HTML that says which model to ship, chosen on the held-out rows: the fastest that keeps `KEPT` of the quality.

    Args:
        rows: From `rows_of`.
        headline: Name of the metric that stands for the task.
    """
    kept = ((row, row.against_dense(held_out_of)) for row in _comparable(rows) if _speed(row) > 1)
    shares = [(row, share.mean) for row, share in kept if share is not None and not share.num_undefined]
    if not shares:
        return "No model can be recommended: none of the cells is faster than the dense model and has a share of its quality."
    good = [(row, share) for row, share in shares if share >= KEPT]
    row, share = max(good, key=lambda found: (_speed(found[0]), found[1])) if good else max(shares, key=lambda found: found[1])
    times = (
        f"{_speed(row):.2f}x the dense model's throughput" if row.speed else f"1/{_speed(row):.2f} of the dense model's FLOPs"
    )
    reached, dense = (
        Row(cells, row.dense).over_seeds(lambda cell: cell["metrics"][headline]) for cells in (row.cells, row.dense)
    )
    name = f"<b>{html.escape(row.name)}</b> ({html.escape(training_of(row.cells[0]))})"
    what = (
        f"{times}, {share:.1%} of its quality on the held-out rows; reported {headline} {reached.text()}, dense {dense.text()}"
    )
    seeds = f"over {len(row.cells)} seeds" if len(row.cells) > 1 else "from one seed, so without an interval"
    if good:
        which = "It is the fastest" if row.speed else "It has the fewest FLOPs"
        return f"Ship {name}: {what}. {which} of {len(good)} that keep at least {KEPT:.0%} there, {seeds}."
    none = f"none of {len(shares)} faster ones keeps {KEPT:.0%} of its quality on the held-out rows, {seeds}"
    return f"Ship the dense model: {none}. The nearest is {name}: {what}."


def _smaller(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.cells[0]["method"] not in ("dense", "control")]


def _comparable(rows: Sequence[Row]) -> list[Row]:
    """The smaller models whose speed was measured; all of them where none was."""
    smaller = _smaller(rows)
    return [row for row in smaller if row.speed] or smaller


def _speed(row: Row) -> float:
    """Measured throughput against the dense model; where it was not measured, how many times fewer FLOPs it has."""
    if row.speed:
        return row.speed["ratio"]
    return row.dense[0]["flops"] / row.cells[0]["flops"]


def _frontier(rows: Sequence[Row], headline: str, figures: Sequence[Path]) -> str:
    dense = next((row for row in rows if row.cells[0]["method"] == "dense"), None)
    found = sorted(_comparable(rows), key=lambda row: row.cells[0]["recovery_epochs"])
    is_timed = any(row.speed for row in found)
    names, points = series_names(found), []
    for row in found:
        value, cell = row.over_seeds(lambda cell: cell["metrics"][headline]), row.cells[0]
        if value.num_undefined:
            continue
        speed, margin = _speed(row), value.margin or 0.0
        tells = (
            row.name,
            training_of(cell),
            f"{headline} {value.text()}",
            f"{speed:.2f}x {'throughput' if is_timed else 'fewer FLOPs'}",
            f"{cell['num_heads']} heads, {cell['parameters']['encoder']:,} encoder parameters",
        )
        series, panel = names[cell["key"]], title_of(cell)
        points.append(Point(series, speed, value.mean, value.mean - margin, value.mean + margin, tells, panel))
    baseline = None if dense is None else dense.over_seeds(lambda cell: cell["metrics"][headline])
    if baseline is None or baseline.num_undefined:
        return ""
    label = "throughput, times that of dense" if is_timed else "times fewer FLOPs than dense (speed was not measured)"
    drawn = next((path for path in figures if path.stem == "frontier"), None)
    return frontier(points, baseline.mean, f"{headline} (reported)", label, drawn)


def _map(row: Row) -> str:
    """Which heads stay; of thin layers also the share of their neurons, where the cell says how many a layer had."""
    cell = row.cells[0]
    neurons, width = cell.get("neurons"), cell.get("ffn_width")
    return head_map(row.keep_rates(), None if neurons is None or not width else [count / width for count in neurons])


def _timed(rows: Sequence[Row]) -> str:
    speed = next((row.speed for row in rows if row.speed), None)
    if not speed:
        return "Speed was not measured."
    return (
        f"Throughput: {speed['batch_size']} x {speed['length']} tokens, {speed['num_threads']} threads, {speed['device']}, "
        f"one run, median over {speed['num_rounds']} rounds; heads spread evenly over the layers."
    )


def _recipes(rows: Sequence[Row]) -> dict[str, Mapping[str, Any]]:
    """The recipes by name; where routing was varied, each variant."""
    recipes: dict[str, Mapping[str, Any]] = {}
    for row in rows:
        recipe = row.cells[0]["settings"]["recipe"]
        if recipe:
            recipes.setdefault(f"{recipe['name']} ({routing_of(recipe)})", recipe)
    return recipes
