"""The result in numbers: a row for each cell (CSV), and means with 95% intervals over seeds (Markdown)."""

import csv
import io
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shrp_hf.measuring.markdown import markdown_table
from shrp_hf.tasks.task import shown

Cell = Mapping[str, Any]
Timings = Mapping[str, Mapping[str, Any]]

STRUCTURES = ("shrp", "thin", "truncate", "spread")
"""Methods that are a structure; the others choose heads."""
_IDENTITY = ("method", "budget", "value", "experts", "expert_selector", "recipe", "recovery_epochs")


@dataclass(frozen=True)
class Estimate:
    """The mean of one number over seeds.

    Args:
        mean: The mean; NaN where the number is undefined for a seed.
        margin: Half the width of the 95% t interval; None where there is one seed, which has none.
        num: Number of seeds.
        num_undefined: Seeds for which it is undefined.
    """

    mean: float
    margin: float | None
    num: int
    num_undefined: int = 0

    def text(self, decimals: int = 4, scale: float = 1.0) -> str:
        """Prints "mean ± margin", or of how many seeds the number is undefined."""
        if self.num_undefined:
            return shown(None) + (f" ({self.num_undefined} of {self.num} seeds)" if self.num > 1 else "")
        margin = "" if self.margin is None else f" ± {self.margin * scale:.{decimals}f}"
        return f"{self.mean * scale:.{decimals}f}{margin}"


def estimate(values: Sequence[float | None]) -> Estimate:
    """Returns the mean and its 95% interval by Student's t, as of independent seeds.

    Args:
        values: One a seed; None or NaN where it is undefined.

    Raises:
        ValueError: There is no value.
    """
    if not values:
        raise ValueError("`values` must hold at least one number, got none.")
    count = len(values)
    num_undefined = sum(value is None or math.isnan(value) for value in values)
    if num_undefined:
        return Estimate(math.nan, None, count, num_undefined)
    if count == 1:
        return Estimate(values[0], None, 1)
    from scipy.stats import t

    margin = float(t.ppf(0.975, count - 1)) * statistics.stdev(values) / math.sqrt(count)
    return Estimate(statistics.fmean(values), margin, count)


@dataclass(frozen=True)
class Row:
    """The cells that differ only in their seed.

    Args:
        cells: The cells, by seed.
        dense: The dense cells of the same seeds, in the same order.
        control: The dense models of those seeds trained on for as long by the same recipe, where there are any.
        speed: Measured speed of their architecture, if it was measured.
    """

    cells: tuple[Cell, ...]
    dense: tuple[Cell, ...]
    control: tuple[Cell, ...] = ()
    speed: Mapping[str, Any] | None = None

    @property
    def name(self) -> str:
        """What the row is called."""
        return name_of(self.cells[0])

    def keep_rates(self) -> list[list[float]]:
        """How often each head stays, 0 to 1: shape (layers, heads)."""
        num_heads = max(head for cell in self.dense for heads in cell["kept"] for head in heads) + 1
        kept = [[set(heads) for heads in cell["kept"]] for cell in self.cells]
        return [
            [statistics.fmean(head in cell[layer] for cell in kept) for head in range(num_heads)]
            for layer in range(len(kept[0]))
        ]

    def over_seeds(self, value: Callable[[Cell], float | None]) -> Estimate:
        """Mean and interval of a number of a cell."""
        return estimate([value(cell) for cell in self.cells])

    def against_dense(self, value: Callable[[Cell], float | None]) -> Estimate | None:
        """Mean and interval of the ratio to the dense model of the same seed; None where one of those is not above 0."""
        return self._against(self.dense, value)

    def against_control(self, value: Callable[[Cell], float | None]) -> Estimate | None:
        """The same of the ratio to the dense model trained on for as long; None also where there is none."""
        return self._against(self.control, value) if self.control else None

    def _against(self, others: Sequence[Cell], value: Callable[[Cell], float | None]) -> Estimate | None:
        pairs = [(value(a), value(b)) for a, b in zip(self.cells, others, strict=True)]
        if not all(other is not None and other > 0 for _, other in pairs):
            return None
        return estimate([None if found is None else found / other for found, other in pairs])


def name_of(cell: Cell) -> str:
    """What cells of this kind are called in tables and pictures."""
    method, value = cell["method"], cell.get("value")
    if method in ("dense", "control"):
        return "dense" if method == "dense" else "dense, trained on"
    if method == "shrp":
        name = f"shrp, {value} layers, {cell['experts']} experts each"
        settings = cell["settings"]["recipe"]
        name += f", {routing_of(settings)}"
    elif method == "truncate":
        name = f"first {value} layers"
    elif method == "spread":
        name = f"{value} layers evenly spread"
    elif method == "thin":
        name = f"thin, searched for {value:g}x" if cell["budget"] == "speedup" else f"thin, {value:.0%} of heads and neurons"
    else:
        budget = {"keep": f"{value:.0%} of heads", "heads": f"{value} heads", "knee_degree": f"knee of degree {value}"}
        name = f"{method}, {budget[cell['budget']]}"
    return name


def routing_of(recipe: Mapping[str, Any]) -> str:
    """How the experts of a recipe were chosen."""
    if recipe["expert_selector"] != "usage":
        return f"by {recipe['expert_selector']}"
    return f"top-{recipe['experts_per_sequence']}, balance {recipe['balance_coef']:g}"


def training_of(cell: Cell) -> str:
    """How cells of this kind were trained after the dense model."""
    if cell["method"] == "dense":
        return "-"
    epochs = f"{cell['recovery_epochs']:g} recovery"
    return epochs if cell["recipe"] is None else f"{cell['recipe']}, {epochs}"


def group_of(cell: Cell) -> str:
    """What cells that differ only in their seed have in common: the key without the seed."""
    return cell["key"].removesuffix(f"-seed{cell['seed']}")


def read_cells(output: Path) -> list[Cell]:
    """Reads every cell of a directory, whichever run made it, in the order of the table."""
    cells = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((output / "cells").glob("*.json"))]
    return sorted(cells, key=lambda cell: (_order(cell), cell["seed"]))


def rows_of(cells: Sequence[Cell], timings: Timings | None = None) -> list[Row]:
    """Gathers cells that differ only in their seed; a cell whose dense model has no cell is left out."""
    dense = {cell["seed"]: cell for cell in cells if cell["method"] == "dense"}
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        if cell["seed"] in dense:
            groups.setdefault(group_of(cell), []).append(cell)
    controls = {_training(cell): cell for cell in cells if cell["method"] == "control"}
    rows = []
    for group, members in groups.items():
        speed = (timings or {}).get(group)
        control = tuple(controls[_training(cell)] for cell in members if _training(cell) in controls)
        others = tuple(dense[cell["seed"]] for cell in members)
        rows.append(Row(tuple(members), others, control if len(control) == len(members) else (), speed))
    return rows


def _training(cell: Cell) -> tuple[Any, ...]:
    return cell["seed"], cell.get("recipe"), cell.get("recovery_epochs")


def table_page(rows: Sequence[Row], headline: str) -> str:
    """Returns `table_of` as Markdown, and why there are no shares where there are none."""
    titles, *lines = table_of(rows, headline)
    reason = no_share(rows, headline)
    return markdown_table(titles, lines, 2) + "\n" + (f"\n{reason}\n" if reason else "")


def no_share(rows: Sequence[Row], headline: str) -> str:
    """Returns why a table has dashes under "of dense"; empty where it has none."""
    if all(row.against_dense(lambda cell: cell["metrics"][headline]) is not None for row in rows):
        return ""
    return f'"-" under "of dense": the {headline} of a dense model is not above 0 or undefined, so nothing is a share of it.'


def table_of(rows: Sequence[Row], headline: str) -> list[list[str]]:
    """Returns titles and lines: mean and 95% interval over seeds of what varies, and what each kind of cell costs.

    Args:
        rows: From `rows_of`.
        headline: Name of the metric that stands for the task.
    """
    quality = f"{headline} (reported)"
    titles = ["", "training", "seeds", quality, "of dense, %", "agreement, %", "held out", "heads", "experts"]
    titles += ["encoder", "encoder + pooler", "whole model", "FLOPs", "examples"]
    has_speed, has_control = any(row.speed for row in rows), any(row.control for row in rows)
    titles[5:5] = ["of control, %"] * has_control
    titles += ["throughput"] * has_speed
    lines = [titles, *_blind_line(rows, headline, len(titles))]
    for row in rows:
        cell, dense = row.cells[0], row.dense[0]
        share = row.against_dense(lambda cell: cell["metrics"][headline])
        line = [
            row.name,
            training_of(cell),
            str(len(row.cells)),
            row.over_seeds(lambda cell: cell["metrics"][headline]).text(),
            "-" if share is None else share.text(1, 100),
            row.over_seeds(lambda cell: cell["agreement"]).text(1, 100),
            row.over_seeds(held_out_of).text(),
            f"{row.over_seeds(lambda cell: cell['num_heads']).mean:g}",
            f"{cell['num_experts']}",
        ]
        if has_control:
            share = row.against_control(lambda cell: cell["metrics"][headline])
            line.insert(5, "-" if share is None else share.text(1, 100))
        for name in ("encoder", "encoder_and_pooler", "whole"):
            count = statistics.fmean(cell["parameters"][name] for cell in row.cells)
            change = count / dense["parameters"][name] - 1
            line.append(f"{count:,.0f}" + (f" ({change:+.1%})" if change else ""))
        line.append(f"{statistics.fmean(cell['flops'] for cell in row.cells) / dense['flops']:.1%}")
        line.append(f"{cell['train_examples']:,}")
        if has_speed:
            line.append(f"{row.speed['ratio']:.2f}x" if row.speed else "-")
        lines.append(line)
    return lines


def held_out_of(cell: Cell) -> float | None:
    """What a cell reaches on the held-out rows, by the metric that chooses; None where it is undefined."""
    return next(iter(cell["held_out"].values()))


def blind_of(row: Row, headline: str) -> tuple[str, Estimate | None, Estimate | None] | None:
    """What answering without reading reaches: name, reported and held-out headline (None: undefined); None if not recorded."""
    baselines = [cell.get("baseline") for cell in row.dense]
    if not all(baselines):
        return None
    values = ([found["metrics"][headline] for found in baselines], [held_out_of(found) for found in baselines])
    reported, held_out = (None if None in found else estimate(found) for found in values)
    return baselines[0]["name"], reported, held_out


def _blind_line(rows: Sequence[Row], headline: str, width: int) -> list[list[str]]:
    dense = next((row for row in rows if row.cells[0]["method"] == "dense"), None)
    found = dense and blind_of(dense, headline)
    if not found:
        return []
    name, reported, held_out = found
    shares = ["-"] * (2 + any(row.control for row in rows))
    shown = [reported.text() if reported else "- (undefined)", *shares, held_out.text() if held_out else "- (undefined)"]
    return [[name, "-", str(len(dense.cells)), *shown, *["-"] * (width - 3 - len(shown))]]


def csv_text(cells: Sequence[Cell], timings: Timings | None = None) -> str:
    """Returns a table with one row a cell: what it is, what it reached, what it costs. Empty where a number has no meaning."""
    metrics = list(dict.fromkeys(name for cell in cells for name in cell["metrics"]))
    rows = []
    for cell in cells:
        row = {name: cell.get(name) for name in ("key", *_IDENTITY, "seed", "num_heads", "num_experts")}
        row |= {name: cell["metrics"].get(name) for name in metrics}
        row |= {f"held_out_{name}": value for name, value in cell["held_out"].items()}
        row |= {name: cell[name] for name in ("correct", "rows", "agreement", "num_agreeing")}
        row |= {f"parameters_{name}": count for name, count in cell["parameters"].items()}
        row |= {name: cell.get(name) for name in ("flops", "train_examples", "seconds", "part_seconds", "alpha")}
        speed = (timings or {}).get(group_of(cell), {})
        row |= {f"speed_{name}": speed.get(name) for name in ("ratio", "p50_ms", "p95_ms", "sequences_per_second")}
        rows.append({**row, "kept": json.dumps(cell["kept"]), "neurons": json.dumps(cell.get("neurons"))})
    for cell in cells:
        baseline = cell.get("baseline")
        if baseline:
            row = {"key": f"majority-seed{cell['seed']}", "method": "majority", "seed": cell["seed"], "rows": cell["rows"]}
            row |= baseline["metrics"] | {f"held_out_{name}": value for name, value in baseline["held_out"].items()}
            rows.append(dict.fromkeys(rows[0]) | row)
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def _order(cell: Cell) -> tuple[Any, ...]:
    kinds = {"dense": 0, "truncate": 2, "spread": 3, "thin": 4, "shrp": 5}
    budget = {"keep": 0, "heads": 1, "knee_degree": 2, "share": 0}.get(cell.get("budget"), 3)
    value = cell.get("value") or 0
    # Budgets from mild to severe: fewer heads, a higher degree or speed, fewer layers, more conversions.
    severity = value if cell.get("budget") in ("knee_degree", "speedup") or cell["method"] == "shrp" else -value
    place = kinds.get(cell["method"], 1)
    return place, budget, severity, -cell.get("experts", 0), cell.get("recovery_epochs", 0), cell["key"]
