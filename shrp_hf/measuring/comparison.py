"""Models side by side: a row each, ratios against the first."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from shrp_hf.measuring.cost import ParameterCount
from shrp_hf.measuring.markdown import markdown_table
from shrp_hf.measuring.timing import Timing


def accuracy_interval(num_correct: int, total: int) -> tuple[float, float]:
    """Returns the 95% Wilson score interval of an accuracy, (low, high), both from 0 to 1.

    It stays inside [0, 1] and is not empty at 0 or all correct, where the normal interval is.

    Raises:
        ValueError: `total` is below 1, or `num_correct` is not between 0 and `total`.
    """
    if total < 1 or not 0 <= num_correct <= total:
        raise ValueError(f"`num_correct` must be from 0 to `total`, and `total` at least 1, got {num_correct} of {total}.")
    from scipy.stats import binomtest

    low, high = binomtest(int(num_correct), int(total)).proportion_ci(0.95, method="wilson")
    return float(low), float(high)


@dataclass(frozen=True)
class ModelReport:
    """One row of a comparison.

    Args:
        name: What the row is called.
        parameters: From `count_parameters`.
        flops: From `count_flops`, at one batch size and length for all rows.
        timing: From `measure_throughput`, in one run for all rows.
        correct: Correct predictions and predictions in all, on one evaluation set for all rows.
    """

    name: str
    parameters: ParameterCount
    flops: int
    timing: Timing | None = None
    correct: tuple[int, int] | None = None


def report_table(rows: Sequence[ModelReport], blind: tuple[str, tuple[int, int] | None] | None = None) -> str:
    """Returns a Markdown table of the rows; reductions and ratios are against the first one.

    Accuracy (with its 95% interval) and throughput are columns only if a row has them. Next to a throughput ratio
    stands how much of the FLOP ratio it reaches: fewer FLOPs are not yet lower latency.

    Args:
        rows: The models.
        blind: What answers without reading, as a last row: its name, and its correct answers as in `ModelReport`.

    Raises:
        ValueError: No row; or a row has a timing and the first has none, or one from another run.
    """
    if not rows:
        raise ValueError("`rows` must hold at least one model, got none.")
    columns: dict[str, Callable[[ModelReport], str]] = {"Model": lambda row: row.name}
    if any(row.correct for row in rows):
        columns["Accuracy (95% interval)"] = lambda row: _accuracy_of(row.correct)
    first = rows[0]
    for title, field in (("Encoder", "encoder"), ("Encoder + pooler", "encoder_and_pooler"), ("Whole model", "whole")):
        columns[title] = partial(_count_cell, baseline=first.parameters, field=field)
    columns["FLOPs"] = lambda row: f"{row.flops / 1e9:,.2f} G ({row.flops / first.flops:.1%})"
    if any(row.timing for row in rows):
        if first.timing is None:
            raise ValueError(f"`rows[0]` ({first.name!r}) must have a timing when others do: ratios are against it.")
        columns["Throughput"] = lambda row: _throughput_cell(row, first)
    lines = [[cell(row) for cell in columns.values()] for row in rows]
    if blind is not None:
        cells = [blind[0]] + [_accuracy_of(blind[1])] * any(row.correct for row in rows)
        lines.append([*cells, *["-"] * (len(columns) - len(cells))])
    return markdown_table([*columns], lines)


def _accuracy_of(correct: tuple[int, int] | None) -> str:
    if correct is None:
        return "-"
    low, high = accuracy_interval(*correct)
    return f"{correct[0] / correct[1]:.3f} ({low:.3f} to {high:.3f})"


def _count_cell(row: ModelReport, baseline: ParameterCount, field: str) -> str:
    reduction = row.parameters.reduction_from(baseline)[field]
    return f"{getattr(row.parameters, field):,}" + (f" ({-reduction:+.1%})" if reduction else "")


def _throughput_cell(row: ModelReport, baseline: ModelReport) -> str:
    if row.timing is None:
        return "-"
    ratio = row.timing.ratio_to(baseline.timing)
    limit = baseline.flops / row.flops
    return f"{ratio:.2f}x" + (f" ({ratio / limit:.0%} of the FLOP ratio)" if limit != 1 else "")
