"""The pictures of a comparison: quality against measured speed-up and against kept heads, and which heads stay."""

from collections.abc import Callable, Sequence
from pathlib import Path

from shrp_hf.publishing.plots import plot_keep_rates, plot_panels
from shrp_hf.workflows.compare.tables import STRUCTURES, Cell, Row, routing_of

Points = dict[str, dict[str, list[tuple[float, float, float, float]]]]


def write_figures(output: Path, rows: Sequence[Row], headline: str) -> list[Path]:
    """Draws `frontier` (where speed was measured), `retention` and `heads-*`, each with 95% intervals over seeds.

    Args:
        output: Directory; they go to its `figures`.
        rows: From `rows_of`.
        headline: Name of the metric that stands for the task.

    Returns:
        Paths of what was drawn; nothing without a dense model.
    """
    dense = [row for row in rows if row.cells[0]["method"] == "dense"]
    others = [row for row in rows if row.cells[0]["method"] not in ("dense", "control")]
    if not dense or not others:
        return []
    folder = output / "figures"
    baseline = dense[0].over_seeds(lambda cell: cell["metrics"][headline]).mean
    drawn = []
    frontier = _panels([row for row in others if row.speed], headline, lambda row: row.speed["ratio"])
    if frontier:
        label = "throughput, times that of dense"
        drawn.append(plot_panels(frontier, folder / "frontier.png", baseline, headline, label))
    selected = [row for row in others if row.cells[0]["method"] not in STRUCTURES]
    retention = _panels(selected, headline, lambda row: row.over_seeds(lambda cell: cell["num_heads"]).mean)
    if retention:
        drawn.append(plot_panels(retention, folder / "retention.png", baseline, headline, "kept heads", apart=True))
    budgets: dict[tuple[str, float], dict[str, Row]] = {}
    for row in selected:  # the recovery does not choose heads: one row of several stands for all
        cell = row.cells[0]
        budgets.setdefault((cell["budget"], cell["value"]), {}).setdefault(cell["method"], row)
    for (budget, value), methods in budgets.items():
        title = f"Heads that stay: {next(iter(methods.values())).name.split(', ', 1)[1]}"
        rates = {method: row.keep_rates() for method, row in methods.items()}
        drawn.append(plot_keep_rates(rates, folder / f"heads-{budget}-{value:g}.png", title))
    return drawn


def _panels(rows: Sequence[Row], headline: str, x: Callable[[Row], float]) -> Points:
    """A panel per length of recovery, a series per name of `series_names`."""
    names = series_names(rows)
    panels: Points = {}
    for row in sorted(rows, key=lambda row: row.cells[0]["recovery_epochs"]):
        cell, value = row.cells[0], row.over_seeds(lambda cell: cell["metrics"][headline])
        if value.num_undefined:
            continue
        margin = value.margin or 0.0
        point = (x(row), value.mean, value.mean - margin, value.mean + margin)
        panels.setdefault(title_of(cell), {}).setdefault(names[cell["key"]], []).append(point)
    return panels


def title_of(cell: Cell) -> str:
    """The title of a cell's panel."""
    epochs = cell["recovery_epochs"]
    return f"{epochs:g} epoch{'s' * (epochs != 1)} of recovery" if epochs else "without recovery"


def series_names(rows: Sequence[Row]) -> dict[str, str]:
    """Names the series of each row, by the key of its first cell: the method, and recipe, experts ... where they differ.

    Args:
        rows: Rows of smaller models, from `rows_of`.
    """
    series = {row.cells[0]["key"]: _series(row) for row in rows}
    names = {}
    for key, found in series.items():
        # What all series of this kind share tells nothing apart.
        alike = [other for other in series.values() if other[0] == found[0]]
        tells = [i == 0 or len({other[i] for other in alike} - {""}) > 1 for i in range(len(found))]
        names[key] = ", ".join(part for part, is_told in zip(found, tells, strict=True) if part and is_told)
    return names


def _series(row: Row) -> tuple[str, ...]:
    cell = row.cells[0]
    if cell["method"] == "thin":
        return ("thin, searched" if cell["budget"] == "speedup" else "thin, uniform",)
    if cell["method"] not in STRUCTURES:
        return (cell["method"],)
    recipe = cell["settings"]["recipe"]
    if cell["method"] != "shrp":
        return "first layers" if cell["method"] == "truncate" else "spread layers", recipe["name"]
    experts = f"{cell['experts']} expert{'s' * (cell['experts'] > 1)}"
    if recipe["expert_selector"] != "usage":
        return "shrp", experts, recipe["name"], routing_of(recipe), "", ""
    return "shrp", experts, recipe["name"], "by routers", *routing_of(recipe).split(", ")
