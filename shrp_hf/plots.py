"""Pictures of usage, plans, quality curves and clusters; every function writes one file and returns its path."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from shrp_hf.plan import KeepPlan

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KEPT_COLOUR = "#d1495b"
INK = "#3b3b3b"
_MARKERS = "osD^vPX*<>"


def plot_usage(usage: Mapping[int, Sequence[int]], path: str | Path, kept: KeepPlan | None = None) -> Path:
    """Draws where the sequences were routed: a heat map of layers x experts, in percent of each layer's sequences.

    Args:
        usage: Layer index -> one count per expert, as `model.usage()` returns it.
        path: Where to; the suffix chooses the format (.png, .svg, .pdf).
        kept: A plan whose kept experts are outlined.

    Raises:
        ValueError: No layer, layers of different width, a negative count, a layer without any count, or `kept` is for
            another number of experts or fewer layers.
        ImportError: matplotlib is not installed.
    """
    layers = sorted(usage)
    counts = _matrix([list(usage[layer]) for layer in layers], "usage")
    if (counts < 0).any() or (counts.sum(dim=1) == 0).any():
        raise ValueError("`usage` must hold counts of 0 or more, and some in every layer: route a dataset first.")
    if kept is not None and (kept.num_heads != counts.shape[1] or kept.num_layers <= layers[-1]):
        raise ValueError(
            f"`kept` is for {kept.num_layers} layers of {kept.num_heads} heads, but `usage` has layers up to "
            f"{layers[-1]} and {counts.shape[1]} experts."
        )
    shares = 100 * counts / counts.sum(dim=1, keepdim=True)
    figure, axes = _grid_figure(*shares.shape)
    _heat_map(figure, axes, shares, layers, "sequences of the layer (%)", 0)
    if kept is not None:
        _outline(axes, [(row, expert) for row, layer in enumerate(layers) for expert in kept.kept[layer]])
    axes.set_xlabel("expert" if kept is None else "expert (outlined: kept)")
    axes.set_title("Usage of the experts")
    return _write(figure, path)


def plot_head_map(scores: Sequence[Sequence[float]] | torch.Tensor, plan: KeepPlan, path: str | Path) -> Path:
    """Draws the score of every head, higher = keep, with the kept ones outlined.

    Args:
        scores: Shape (layers, heads); NaN, a head there was no choice about, stays blank.
        plan: The heads that stay.
        path: Where to; the suffix chooses the format.

    Raises:
        ValueError: `scores` is no matrix of finite numbers, or has another shape than `plan`.
        ImportError: matplotlib is not installed.
    """
    scores = _matrix(scores, "scores", blanks=True)
    if scores.shape != (plan.num_layers, plan.num_heads):
        raise ValueError(
            f"`scores` must have the plan's shape ({plan.num_layers}, {plan.num_heads}), got {tuple(scores.shape)}."
        )
    figure, axes = _grid_figure(*scores.shape)
    scaled, unit, decimals = _scaled(scores)
    _heat_map(figure, axes, scaled, range(plan.num_layers), f"score (higher = keep{unit})", decimals)
    _outline(axes, [(layer, head) for layer, heads in enumerate(plan.kept) for head in heads])
    axes.set_xlabel("head (outlined: kept)")
    axes.set_title(f"Scores of the heads: {plan.num_kept} of {plan.num_layers * plan.num_heads} kept")
    return _write(figure, path)


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
    figure, axes = _figure(7.0, 4.4)
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
    _finish_lines(axes)
    return _write(figure, path)


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
    figure, axes = _figure(7.0, 4.4)
    tables = _point_tables(points, "speed-up")
    if any((table[:, 0] <= 0).any() for table in tables.values()):
        raise ValueError("`points` must hold speed-ups of more than 0.")
    for i, (name, table) in enumerate(tables.items()):
        _error_bars(axes, i, name, table)
    axes.axhline(baseline, color=INK, linestyle="--", linewidth=1, label="dense")
    fastest = max(table[:, 0].max().item() for table in tables.values())
    if fastest > 2:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axes.set_xlabel("measured throughput against the dense model")
    axes.set_ylabel(quality)
    axes.set_title(f"{quality.capitalize()} against measured speed-up")
    _finish_lines(axes)
    return _write(figure, path)


def plot_panels(
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, float, float, float]]]],
    path: str | Path,
    baseline: float,
    quality: str,
    x_label: str,
) -> Path:
    """Draws quality against a cost for many series, spread over panels that share the x axis, colours and one legend.

    Args:
        panels: Title -> series -> (x, quality, low, high) for each point; a series named "random", the control, is grey.
        path: Where to; the suffix chooses the format.
        baseline: Quality of the dense model, drawn as a dashed line.
        quality: What is measured, for the axis.
        x_label: What x is, for the axis.

    Raises:
        ValueError: As in `plot_quality_curve`, or there is no panel.
        ImportError: matplotlib is not installed.
    """
    if not panels:
        raise ValueError("`panels` must hold at least one panel, got none.")
    tables = {title: _point_tables(points, x_label) for title, points in panels.items()}
    names = list(dict.fromkeys(name for points in tables.values() for name in points))
    # Each panel has a y axis of its own: what is lost without recovery would flatten all that is left with it.
    figure, grid = _panel_figure(len(tables), (4.6, 4.0), legend_width=2.4)
    for axes, (title, points) in zip(grid, tables.items(), strict=True):
        axes.axhline(baseline, color=INK, linestyle="--", linewidth=1, label="dense")
        for name, table in points.items():
            _error_bars(axes, names.index(name), name, table, is_control=name.split(",")[0] == "random")
        axes.set(title=title, xlabel=x_label, ylabel=quality if axes is grid[0] else "")
        _finish_lines(axes)
        axes.get_legend().remove()
    handles = {label: handle for axes in grid for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    ordered = ["dense", *names]
    figure.legend([handles[name] for name in ordered], ordered, loc="outside right center", frameon=False, fontsize=9)
    return _write(figure, path)


def plot_keep_rates(rates: Mapping[str, Sequence[Sequence[float]] | torch.Tensor], path: str | Path, title: str) -> Path:
    """Draws how often each head stays, over seeds, a panel per method: do they find the same heads, and the same each time?

    Args:
        rates: Method -> shape (layers, heads), 0 to 1.
        path: Where to; the suffix chooses the format.
        title: What was kept.

    Raises:
        ValueError: There is no method, or `rates` are no matrices of numbers from 0 to 1.
        ImportError: matplotlib is not installed.
    """
    tables = {name: _matrix(rate, f"rates[{name!r}]") for name, rate in rates.items()}
    if not tables or any((table < 0).any() or (table > 1).any() for table in tables.values()):
        raise ValueError(f"`rates` must hold numbers from 0 to 1 for at least one method, got {list(tables) or 'none'}.")
    num_layers, num_heads = next(iter(tables.values())).shape
    figure, grid = _panel_figure(len(tables), (max(2.2, 0.6 + 0.2 * num_heads), max(1.8, 0.8 + 0.2 * num_layers)))
    for axes, (name, table) in zip(grid, tables.items(), strict=True):
        image = axes.imshow(100 * table.numpy(), cmap="Blues", vmin=0, vmax=100, aspect="auto")
        axes.set(title=name, xlabel="head", ylabel="layer" if axes is grid[0] else "")
        axes.set_xticks(range(0, num_heads, max(1, num_heads // 6)))
        axes.set_yticks(range(num_layers))
        axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=grid, label="seeds that keep it (%)", shrink=0.8)
    figure.suptitle(title)
    return _write(figure, path)


def _panel_figure(count: int, size: tuple[float, float], legend_width: float = 0.0) -> "tuple[Figure, list[Axes]]":
    columns = min(count, 4 if legend_width == 0 else 3)
    rows = -(-count // columns)
    figure, axes = _figure(columns * size[0] + legend_width, rows * size[1] + 0.3)
    axes.remove()
    share_y = legend_width == 0
    grid = figure.subplots(rows, columns, sharex=True, sharey=share_y, squeeze=False).flatten().tolist()
    for axes in grid[count:]:
        axes.remove()
    return figure, grid[:count]


def _point_tables(points: Mapping[str, Sequence[tuple[float, ...]]], what: str) -> dict[str, torch.Tensor]:
    if not points:
        raise ValueError("`points` must hold at least one selector, got none.")
    tables = {name: _matrix([list(point) for point in rows], f"points[{name!r}]", 4) for name, rows in points.items()}
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
    colour = "#8a8a8a" if is_control else f"C{index % 10}"
    line = ("-", "--", ":")[index // 10 % 3]
    axes.errorbar((x + shift).numpy(), value.numpy(), yerr=errors, label=name, color=colour, linestyle=line, **style)


def plot_clusters(
    points: Sequence[Sequence[float]] | torch.Tensor,
    labels: Sequence[int],
    medoids: Sequence[int],
    kept: Sequence[int],
    path: str | Path,
) -> Path:
    """Draws CAHP's plane (arXiv 2606.19150): every head a dot in its cluster's colour, joined to the cluster's medoid.

    Args:
        points: Shape (heads, 2), the t-SNE plane.
        labels: Cluster of each head, an index into `medoids`.
        medoids: Index of each cluster's medoid among the heads.
        kept: Indices of the heads that stay; ringed.
        path: Where to; the suffix chooses the format.

    Raises:
        ValueError: `points` is not (heads, 2), `labels` has another length, or an index is out of range.
        ImportError: matplotlib is not installed.
    """
    plane = _matrix(points, "points", 2)
    if len(labels) != len(plane):
        raise ValueError(f"`labels` must name a cluster for each of {len(plane)} heads, got {len(labels)}.")
    checks = (("medoids", medoids, len(plane)), ("labels", labels, len(medoids)), ("kept", kept, len(plane)))
    for name, indices, count in checks:
        wrong = [int(i) for i in indices if not 0 <= i < count]
        if wrong:
            raise ValueError(f"`{name}` must be indices from 0 to {count - 1}, got {wrong[0]}.")
    figure, axes = _figure(7.0, 5.6)
    colours = _cluster_colours(len(medoids))
    of_head = [colours[int(label)] for label in labels]
    for head, label in enumerate(labels):
        line = plane[[head, int(medoids[int(label)])]]
        axes.plot(*line.T.numpy(), color=of_head[head], linewidth=0.8, alpha=0.45, zorder=1)
    axes.scatter(*plane.T.numpy(), c=of_head, s=26, linewidths=0, zorder=2, label="head")
    centre, chosen = plane[[int(i) for i in medoids]], plane[[int(i) for i in kept]]
    axes.scatter(*centre.T.numpy(), c=colours, s=95, marker="D", edgecolors="white", zorder=3, label="medoid")
    axes.scatter(*chosen.T.numpy(), s=120, facecolors="none", edgecolors=INK, linewidths=1.5, zorder=4, label="kept")
    axes.set_title(f"{len(plane)} heads in {len(medoids)} clusters, {len(kept)} kept")
    axes.set_xlabel("t-SNE 1")
    axes.set_ylabel("t-SNE 2")
    legend = axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    for handle in legend.legend_handles[:2]:
        handle.set_facecolor("#9a9a9a")  # the colour of a cluster would say nothing here
    return _write(figure, path)


def plot_knee(ks: Sequence[int], mss: Sequence[float], knee: int | None, path: str | Path) -> Path:
    """Draws CAHP's separation score against the number of clusters, with the knee.

    Args:
        ks: Numbers of clusters.
        mss: Mean simplified silhouette for each.
        knee: The number of clusters chosen, one of `ks`, or None where there is no knee.
        path: Where to; the suffix chooses the format.

    Raises:
        ValueError: `ks` and `mss` differ in length, are empty or not finite, or `knee` is not one of `ks`.
        ImportError: matplotlib is not installed.
    """
    if len(ks) != len(mss) or not len(ks):
        raise ValueError(f"`ks` and `mss` must have one length, at least 1, got {len(ks)} and {len(mss)}.")
    curve = _matrix([list(ks), list(mss)], "mss")
    if knee is not None and knee not in list(ks):
        raise ValueError(f"`knee` must be one of `ks` ({min(ks)} to {max(ks)}) or None, got {knee}.")
    figure, axes = _figure(6.4, 4.0)
    axes.plot(*curve.numpy(), color="C0", linewidth=1.8, marker="." if len(ks) < 40 else None)
    if knee is not None:
        score = curve[1, list(ks).index(knee)].item()
        axes.axvline(knee, color=KEPT_COLOUR, linestyle="--", linewidth=1.2)
        axes.plot([knee], [score], "o", color=KEPT_COLOUR, markersize=7)
        late = knee > (min(ks) + max(ks)) / 2  # the words go where there is room
        axes.annotate(
            f"knee: k = {knee}", (knee, score), (-10 if late else 10, -18), textcoords="offset points",
            ha="right" if late else "left", color=KEPT_COLOUR,
        )  # fmt: skip
    axes.set_xlabel("clusters k")
    axes.set_ylabel("mean simplified silhouette")
    axes.set_title("Choice of the number of clusters" + ("" if knee is not None else ": no knee"))
    _finish_lines(axes)
    return _write(figure, path)


def _matrix(
    values: Sequence[Sequence[float]] | torch.Tensor, name: str, num_columns: int | None = None, blanks: bool = False
) -> torch.Tensor:
    wanted = "a matrix of finite numbers" + (f", {num_columns} in each row" if num_columns else "")
    try:
        matrix = torch.as_tensor(values, dtype=torch.float64).detach().cpu()
    except (TypeError, ValueError) as error:
        raise ValueError(f"`{name}` must be {wanted}: {error}.") from error
    fits = matrix.dim() == 2 and matrix.numel() and num_columns in (None, matrix.shape[1])
    known = matrix[~matrix.isnan()] if blanks else matrix
    finite = bool(known.isfinite().all()) and known.numel() > 0
    if not fits or not finite:
        raise ValueError(f"`{name}` must be {wanted}, got shape {tuple(matrix.shape)}, all finite: {finite}.")
    return matrix


def _figure(width: float, height: float) -> "tuple[Figure, Axes]":
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Pictures need matplotlib: pip install 'shrp-hf[plots]'.") from error
    # The object-oriented API, not pyplot: no global state, no window system.
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _grid_figure(num_rows: int, num_columns: int) -> "tuple[Figure, Axes]":
    return _figure(max(4.5, 0.52 * num_columns + 2.0), max(2.2, 0.36 * num_rows + 1.5))


def _heat_map(
    figure: "Figure", axes: "Axes", values: torch.Tensor, layers: Sequence[int], meaning: str, decimals: int
) -> None:
    lowest = values[~values.isnan()].min().item()
    image = axes.imshow(values.numpy(), cmap="Blues", aspect="auto", vmin=min(0.0, lowest))
    figure.colorbar(image, ax=axes, label=meaning, fraction=0.05, pad=0.02).outline.set_visible(False)
    axes.set_xticks(range(values.shape[1]), range(values.shape[1]))
    axes.set_yticks(range(len(layers)), layers)
    axes.set_ylabel("layer")
    axes.set_xticks([i + 0.5 for i in range(values.shape[1] - 1)], minor=True)
    axes.set_yticks([i + 0.5 for i in range(len(layers) - 1)], minor=True)
    axes.grid(which="minor", color="white", linewidth=1.2)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    size = 8.5 if values.shape[1] <= 12 else 6.5
    for row, line in enumerate(values.tolist()):
        for column, value in enumerate(line):
            if math.isnan(value):
                continue
            colour = "white" if image.norm(value) > 0.55 else INK
            axes.text(column, row, f"{value:.{decimals}f}", ha="center", va="center", fontsize=size, color=colour)


def _outline(axes: "Axes", cells: Sequence[tuple[int, int]]) -> None:
    from matplotlib.patches import Rectangle

    for row, column in cells:
        box = Rectangle((column - 0.45, row - 0.43), 0.9, 0.86, fill=False, edgecolor=KEPT_COLOUR, linewidth=1.8)
        axes.add_patch(box)


def _scaled(values: torch.Tensor) -> tuple[torch.Tensor, str, int]:
    """Returns values that print in a few characters, the words for their scale, and the decimals to print."""
    largest = values[~values.isnan()].abs().max().item()
    exponent = math.floor(math.log10(largest)) if largest else 0
    if -2 <= exponent <= 2:
        return values, "", 2 if exponent < 1 else 0
    return values / 10.0**exponent, f", in units of 1e{exponent}", 2


def _cluster_colours(count: int) -> list[tuple[float, float, float]]:
    from matplotlib.colors import hsv_to_rgb

    # Steps of the golden ratio keep clusters with neighbouring numbers apart, however many there are.
    hues = [(i * (math.sqrt(5) - 1) / 2) % 1 for i in range(count)]
    return [tuple(hsv_to_rgb((hue, 0.65, 0.85 if i % 2 else 0.65))) for i, hue in enumerate(hues)]


def _finish_lines(axes: "Axes") -> None:
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)


def _write(figure: "Figure", path: str | Path) -> Path:
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Several processes may draw one picture: runs of a comparison that end at the same time.
    partial = target.with_name(f".{target.stem}.{os.getpid()}.partial{target.suffix}")
    try:
        figure.savefig(partial, dpi=160)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return target
