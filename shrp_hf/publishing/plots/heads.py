"""Pictures of usage, plans and clusters."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from shrp_hf.plans.keep_plan import KeepPlan
from shrp_hf.publishing.plots.drawing import (
    INK,
    KEPT_COLOUR,
    checked_matrix,
    finish_lines,
    new_figure,
    new_grid,
    new_panels,
    write_figure,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


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
    counts = checked_matrix([list(usage[layer]) for layer in layers], "usage")
    if (counts < 0).any() or (counts.sum(dim=1) == 0).any():
        raise ValueError("`usage` must hold counts of 0 or more, and some in every layer: route a dataset first.")
    if kept is not None and (kept.num_heads != counts.shape[1] or kept.num_layers <= layers[-1]):
        raise ValueError(
            f"`kept` is for {kept.num_layers} layers of {kept.num_heads} heads, but `usage` has layers up to "
            f"{layers[-1]} and {counts.shape[1]} experts."
        )
    shares = 100 * counts / counts.sum(dim=1, keepdim=True)
    figure, axes = new_grid(*shares.shape)
    _heat_map(figure, axes, shares, layers, "sequences of the layer (%)", 0)
    if kept is not None:
        _outline(axes, [(row, expert) for row, layer in enumerate(layers) for expert in kept.kept[layer]])
    axes.set_xlabel("expert" if kept is None else "expert (outlined: kept)")
    axes.set_title("Usage of the experts")
    return write_figure(figure, path)


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
    scores = checked_matrix(scores, "scores", blanks=True)
    if scores.shape != (plan.num_layers, plan.num_heads):
        raise ValueError(
            f"`scores` must have the plan's shape ({plan.num_layers}, {plan.num_heads}), got {tuple(scores.shape)}."
        )
    figure, axes = new_grid(*scores.shape)
    scaled, unit, decimals = _scaled(scores)
    _heat_map(figure, axes, scaled, range(plan.num_layers), f"score (higher = keep{unit})", decimals)
    _outline(axes, [(layer, head) for layer, heads in enumerate(plan.kept) for head in heads])
    axes.set_xlabel("head (outlined: kept)")
    axes.set_title(f"Scores of the heads: {plan.num_kept} of {plan.num_layers * plan.num_heads} kept")
    return write_figure(figure, path)


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
    tables = {name: checked_matrix(rate, f"rates[{name!r}]") for name, rate in rates.items()}
    if not tables or any((table < 0).any() or (table > 1).any() for table in tables.values()):
        raise ValueError(f"`rates` must hold numbers from 0 to 1 for at least one method, got {list(tables) or 'none'}.")
    num_layers, num_heads = next(iter(tables.values())).shape
    figure, grid = new_panels(len(tables), (max(2.2, 0.6 + 0.2 * num_heads), max(1.8, 0.8 + 0.2 * num_layers)))
    for axes, (name, table) in zip(grid, tables.items(), strict=True):
        image = axes.imshow(100 * table.numpy(), cmap="Blues", vmin=0, vmax=100, aspect="auto")
        axes.set(title=name, xlabel="head", ylabel="layer" if axes is grid[0] else "")
        axes.set_xticks(range(0, num_heads, max(1, num_heads // 6)))
        axes.set_yticks(range(num_layers))
        axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=grid, label="seeds that keep it (%)", shrink=0.8)
    figure.suptitle(title)
    return write_figure(figure, path)


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
    plane = checked_matrix(points, "points", 2)
    if len(labels) != len(plane):
        raise ValueError(f"`labels` must name a cluster for each of {len(plane)} heads, got {len(labels)}.")
    checks = (("medoids", medoids, len(plane)), ("labels", labels, len(medoids)), ("kept", kept, len(plane)))
    for name, indices, count in checks:
        wrong = [int(i) for i in indices if not 0 <= i < count]
        if wrong:
            raise ValueError(f"`{name}` must be indices from 0 to {count - 1}, got {wrong[0]}.")
    figure, axes = new_figure(7.0, 5.6)
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
    return write_figure(figure, path)


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
    curve = checked_matrix([list(ks), list(mss)], "mss")
    if knee is not None and knee not in list(ks):
        raise ValueError(f"`knee` must be one of `ks` ({min(ks)} to {max(ks)}) or None, got {knee}.")
    figure, axes = new_figure(6.4, 4.0)
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
    finish_lines(axes)
    return write_figure(figure, path)


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
