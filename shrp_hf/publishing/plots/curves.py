"""Pictures of quality against cost, and of speed."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from shrp_hf.publishing.plots.drawing import INK, checked_matrix, finish_lines, new_figure, new_panels, write_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MARKERS = "osD^vPX*<>"
_COLOURS = [f"C{i}" for i in range(10) if i != 7]  # C7 is the grey of the control


def plot_quality_curve(
    points: Mapping[str, Sequence[tuple[float, float, float, float]]],
    path: str | Path,
    baseline: float | None = None,
    quality: str = "accuracy",
) -> Path:
    """Draws quality against the number of kept heads, a line per selector.

    Args:
        points: Selector -> (kept heads, quality, low, high) for each plan; low and high are the ends of the error bar.
        path: Where to; the suffix chooses the format.
        baseline: Quality of the unpruned model, drawn as a dashed line.
        quality: What is measured, for the axis.

    Raises:
        ValueError: No selector, one without points, or a point that is not four finite numbers with
            low <= quality <= high.
        ImportError: matplotlib is not installed.
    """
    figure, axes = new_figure(7.0, 4.4)
    tables = _point_tables(points, "kept heads")
    # A small sideways shift per selector keeps the error bars of one budget apart.
    step = 0.006 * max(table[:, 0].max().item() for table in tables.values())
    for i, (name, table) in enumerate(tables.items()):
        _error_bars(axes, i, name, table, shift=(i - (len(tables) - 1) / 2) * step)
    if baseline is not None:
        axes.axhline(baseline, color=INK, linestyle="--", linewidth=1, label="unpruned")
    axes.set_xlabel("kept heads")
    axes.set_ylabel(quality)
    axes.set_title(f"{quality.capitalize()} against kept heads")
    finish_lines(axes)
    return write_figure(figure, path)


def plot_frontier(
    points: Mapping[str, Sequence[tuple[float, float, float, float]]],
    path: str | Path,
    baseline: float,
    quality: str = "accuracy",
) -> Path:
    """Draws quality against measured speed-up, a line per method: up and to the right is better.

    Args:
        points: Method -> (speed-up over the dense model, quality, low, high); low and high are the ends of the error bar.
        path: Where to; the suffix chooses the format.
        baseline: Quality of the dense model, drawn as a dashed line; its speed-up is 1.
        quality: What is measured, for the axis.

    Raises:
        ValueError: As in `plot_quality_curve`, or a speed-up is not more than 0.
        ImportError: matplotlib is not installed.
    """
    figure, axes = new_figure(7.0, 4.4)
    tables = _point_tables(points, "speed-up")
    if any((table[:, 0] <= 0).any() for table in tables.values()):
        raise ValueError("`points` must hold speed-ups of more than 0.")
    for i, (name, table) in enumerate(tables.items()):
        _error_bars(axes, i, name, table)
    axes.axhline(baseline, color=INK, linestyle="--", linewidth=1, label="dense")
    speedups = [speedup for table in tables.values() for speedup in table[:, 0].tolist()]
    if max(speedups) > 2:
        axes.set_xscale("log", base=2)
        axes.set_xticks(_ticks(min(speedups), max(speedups)))
        axes.minorticks_off()
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axes.set_xlabel("measured throughput against the dense model")
    axes.set_ylabel(quality)
    axes.set_title(f"{quality.capitalize()} against measured speed-up")
    finish_lines(axes)
    return write_figure(figure, path)


def _ticks(low: float, high: float) -> list[float]:
    """Round speed-ups around all that is drawn: powers of two, and halfway between."""
    steps = [2.0**power * part for power in range(-3, 8) for part in (1, 1.5)]
    first = max(i for i, step in enumerate(steps) if step <= max(low, steps[0]))
    last = next((i for i, step in enumerate(steps) if step >= high), len(steps) - 1)
    return steps[first : last + 1]


def plot_panels(
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, float, float, float]]]],
    path: str | Path,
    baseline: float,
    quality: str,
    x_label: str,
    *,
    apart: bool = False,
) -> Path:
    """Draws quality against a cost for many series, spread over panels that share the x axis, colours and one legend.

    Args:
        panels: Title -> series -> (x, quality, low, high) for each point; a series named "random", the control, is grey.
        path: Where to; the suffix chooses the format.
        baseline: Quality of the dense model, drawn as a dashed line.
        quality: What is measured, for the axis.
        x_label: What x is, for the axis.
        apart: Move the series of a panel a little sideways, so that error bars at one x are told apart; not for a measured x.

    Raises:
        ValueError: As in `plot_quality_curve`, or there is no panel.
        ImportError: matplotlib is not installed.
    """
    if not panels:
        raise ValueError("`panels` must hold at least one panel, got none.")
    tables = {title: _point_tables(points, x_label) for title, points in panels.items()}
    names = list(dict.fromkeys(name for points in tables.values() for name in points))
    # Each panel has a y axis of its own: what is lost without recovery would flatten all that is left with it.
    xs = torch.cat([table[:, 0] for points in tables.values() for table in points.values()])
    step = 0.012 * ((xs.max() - xs.min()).item() or 1.0) if apart else 0.0
    figure, grid = new_panels(len(tables), (4.6, 4.0), legend_width=2.4)
    for axes, (title, points) in zip(grid, tables.items(), strict=True):
        axes.axhline(baseline, color=INK, linestyle="--", linewidth=1, label="dense")
        for i, (name, table) in enumerate(points.items()):
            shift = (i - (len(points) - 1) / 2) * step
            _error_bars(axes, names.index(name), name, table, shift, is_control=name.split(",")[0] == "random")
        axes.set(title=title, xlabel=x_label, ylabel=quality if axes is grid[0] else "")
        finish_lines(axes)
        axes.get_legend().remove()
    handles = {label: handle for axes in grid for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    ordered = ["dense", *names]
    figure.legend([handles[name] for name in ordered], ordered, loc="outside right center", frameon=False, fontsize=9)
    return write_figure(figure, path)


def plot_speed(panels: Mapping[str, Mapping[str, Mapping[str, float]]], path: str | Path, baseline: str) -> Path:
    """Draws speed-ups as bars, a panel per workload, a colour per runtime.

    Args:
        panels: Workload -> runtime -> model -> speed-up over the baseline, more than 0.
        path: Where to; the suffix chooses the format.
        baseline: What 1 is, for the axis.

    Raises:
        ValueError: There is no panel or no bar, or a speed-up is not a finite number above 0.
        ImportError: matplotlib is not installed.
    """
    values = [value for bars in panels.values() for models in bars.values() for value in models.values()]
    if not values or not all(0 < value < float("inf") for value in values):
        raise ValueError(f"`panels` must hold finite speed-ups above 0, at least one, got {values or 'none'}.")
    figure, grid = new_panels(len(panels), (4.6, 3.6), legend_width=1.4)
    for axes, (title, runtimes) in zip(grid, panels.items(), strict=True):
        names = list(dict.fromkeys(name for models in runtimes.values() for name in models))
        width = 0.8 / len(runtimes)
        for i, (runtime, models) in enumerate(runtimes.items()):
            places = [names.index(name) + (i - (len(runtimes) - 1) / 2) * width for name in models]
            bars = axes.bar(places, list(models.values()), width, label=runtime, color=f"C{i}")
            axes.bar_label(bars, fmt="%.1f", fontsize=7, padding=1)
        axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
        axes.set(title=title, ylabel=f"throughput, times that of {baseline}" if axes is grid[0] else "")
        finish_lines(axes)
        axes.get_legend().remove()
    handles = {label: handle for axes in grid for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside right center", frameon=False, fontsize=9)
    return write_figure(figure, path)


def _point_tables(points: Mapping[str, Sequence[tuple[float, ...]]], what: str) -> dict[str, torch.Tensor]:
    if not points:
        raise ValueError("`points` must hold at least one selector, got none.")
    tables = {name: checked_matrix([list(point) for point in rows], f"points[{name!r}]", 4) for name, rows in points.items()}
    for name, table in tables.items():
        _, value, low, high = table.unbind(dim=1)
        if (low > value).any() or (high < value).any():
            raise ValueError(f"`points[{name!r}]` must be ({what}, quality, low, high), low <= quality <= high.")
    return tables


def _error_bars(
    axes: "Axes", index: int, name: str, table: torch.Tensor, shift: float = 0.0, is_control: bool = False
) -> None:
    x, value, low, high = table[table[:, 0].argsort()].unbind(dim=1)
    errors = torch.stack([value - low, high - value]).numpy()
    style = {"marker": _MARKERS[index % len(_MARKERS)], "markersize": 5, "capsize": 2.5, "elinewidth": 1}
    colour = "#8a8a8a" if is_control else _COLOURS[index % len(_COLOURS)]
    line = ("-", "--", ":")[index // len(_COLOURS) % 3]
    axes.errorbar((x + shift).numpy(), value.numpy(), yerr=errors, label=name, color=colour, linestyle=line, **style)
