"""What the pictures share: figures without a window system, matrices that are checked, files written whole."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from shrp_hf.files import written_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KEPT_COLOUR = "#d1495b"
INK = "#3b3b3b"
DPI = 160


def checked_matrix(
    values: Sequence[Sequence[float]] | torch.Tensor, name: str, num_columns: int | None = None, blanks: bool = False
) -> torch.Tensor:
    """Returns values as a matrix in float64, or says by `name` what is wrong with them; NaN is allowed as a blank."""
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


def check_drawable() -> None:
    """Lets a run that ends with pictures fail before its work instead of after it.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError("Pictures need matplotlib: pip install 'shrp-hf[plots]'.") from error


def new_figure(width: float, height: float) -> "tuple[Figure, Axes]":
    """Returns a figure of that size in inches and its axes; matplotlib is imported here."""
    check_drawable()
    from matplotlib.figure import Figure

    # The object-oriented API, not pyplot: no global state, no window system.
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def new_grid(num_rows: int, num_columns: int) -> "tuple[Figure, Axes]":
    """Returns a figure for a table of cells that carry numbers."""
    return new_figure(max(4.5, 0.52 * num_columns + 2.0), max(2.2, 0.36 * num_rows + 1.5))


def new_panels(count: int, size: tuple[float, float], legend_width: float = 0.0) -> "tuple[Figure, list[Axes]]":
    """Returns a figure of `count` panels of that size in inches that share their x axis, with room for one legend."""
    columns = min(count, 4 if legend_width == 0 else 3)
    rows = -(-count // columns)
    figure, axes = new_figure(columns * size[0] + legend_width, rows * size[1] + 0.3)
    axes.remove()
    share_y = legend_width == 0
    grid = figure.subplots(rows, columns, sharex=True, sharey=share_y, squeeze=False).flatten().tolist()
    for axes in grid[:count]:
        axes.tick_params(labelbottom=True)  # the panel below may be missing
    for axes in grid[count:]:
        axes.remove()
    return figure, grid[:count]


def finish_lines(axes: "Axes") -> None:
    """Gives a line plot its grid and its legend."""
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)


def write_figure(figure: "Figure", path: str | Path) -> Path:
    """Writes a figure whole or not at all, and returns where."""
    from PIL import Image  # matplotlib needs it too

    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    image_format = target.suffix[1:] or "png"
    # Several processes may draw one picture: runs of a comparison that end at the same time.
    with written_whole(target) as partial:
        figure.savefig(partial, dpi=DPI, format=image_format)
        if image_format == "png":
            # A third of the size: pages carry their pictures inside, and a drawing has few colours.
            with Image.open(partial) as image:
                image.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(
                    partial, format="png", dpi=(DPI, DPI), optimize=True
                )
    return target
