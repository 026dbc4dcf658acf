"""What `measure_serving` found: rows, the table, and where a speed-up falls short of what FLOPs promise."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shrp_hf.measuring import Timing
from shrp_hf.measuring.markdown import markdown_table
from shrp_hf.publishing.plots import plot_speed
from shrp_hf.publishing.report import write_text

BUSY_SPREAD = 0.25


@dataclass(frozen=True)
class ServingRow:
    """One model in one runtime on one workload.

    Args:
        model: The model's name.
        runtime: The runtime's.
        workload: The workload's, for example "8 x 128".
        timing: How long a call took, in a run shared with all rows of the workload.
        flops: FLOPs of a call.
        weight_bytes: Bytes of the weights; of an exported model, of its file.
        activation_bytes: Most bytes that a call held beyond them; None where the runtime does not tell.
        speedup: Throughput over that of the first model in the first runtime.
        runtime_speedup: Throughput over that of the first model in the same runtime.
        flop_ratio: FLOPs of the first model over those of this one.
    """

    model: str
    runtime: str
    workload: str
    timing: Timing
    flops: int
    weight_bytes: int
    activation_bytes: int | None
    speedup: float
    runtime_speedup: float
    flop_ratio: float

    @property
    def share(self) -> float:
        """How much of its FLOP ratio the speed-up within its runtime reaches; 1 is all of it."""
        return self.runtime_speedup / self.flop_ratio

    def summary(self) -> dict[str, Any]:
        """Returns the figures, ready for JSON; times in milliseconds."""
        timing = {name: value for name, value in self.timing.summary().items() if name != "name"}
        names = ["model", "runtime", "workload", "flops", "weight_bytes", "activation_bytes"]
        names += ["speedup", "runtime_speedup", "flop_ratio", "share"]
        return {**{name: getattr(self, name) for name in names}, **timing}


@dataclass(frozen=True)
class ServingResult:
    """All rows of a run.

    Args:
        model: Name of the baseline.
        runtime: Runtime of the baseline.
        rows: By workload, then model, then runtime.
        agreement: Model and runtime -> how far that int8 file agrees with PyTorch on what `export_model` compared.
    """

    model: str
    runtime: str
    rows: list[ServingRow]
    agreement: Mapping[str, str]

    def row(self, model: str, runtime: str, workload: str) -> ServingRow:
        """Returns one row.

        Args:
            model: Its name.
            runtime: Its runtime.
            workload: Its workload, as `ServingRow.workload` has it.

        Raises:
            KeyError: There is no such row.
        """
        for row in self.rows:
            if (row.model, row.runtime, row.workload) == (model, runtime, workload):
                return row
        raise KeyError((model, runtime, workload))

    def markdown(self) -> str:
        """Returns a table per workload, and in words where a speed-up falls short of its FLOP ratio."""
        parts = []
        for workload in dict.fromkeys(row.workload for row in self.rows):
            rows = [row for row in self.rows if row.workload == workload]
            parts.append(f"### {workload}\n\n" + self._table(rows))
            short = [row for row in rows if row.share < 1]
            if short:
                parts.append(
                    "Falls short of what its FLOPs promise, within its runtime:\n\n" + "\n".join(map(_shortfall, short))
                )
        parts.append(
            f"Speed-up: throughput over that of {self.model} in {self.runtime}, all in one run. Within the runtime: over that "
            f"of {self.model} in the same runtime, beside the ratio of their FLOPs. Memory is in MB; ONNX Runtime and "
            "OpenVINO do not tell what they hold beyond the weights."
        )
        if self.agreement:
            lines = [f"- {name}: {value}" for name, value in self.agreement.items()]
            parts.append("int8 files against PyTorch, on built-in sentences:\n\n" + "\n".join(lines))
        spread = max(row.timing.spread for row in self.rows)
        if spread > BUSY_SPREAD:
            parts.append(f"**The largest spread (quartiles over median) is {spread:.0%}: something else ran. Run it again.**")
        return "\n\n".join(parts) + "\n"

    @staticmethod
    def _table(rows: list[ServingRow]) -> str:
        columns: dict[str, Callable[[ServingRow], str]] = {
            "Model": lambda row: row.model,
            "Runtime": lambda row: row.runtime,
            "p50 (ms)": lambda row: f"{1e3 * row.timing.p50:.2f}",
            "p95 (ms)": lambda row: f"{1e3 * row.timing.p95:.2f}",
            "Sequences/s": lambda row: f"{row.timing.sequences_per_second:.1f}",
            "Speed-up": lambda row: f"{row.speedup:.2f}x",
            "Within the runtime": lambda row: f"{row.runtime_speedup:.2f}x",
            "FLOP ratio": lambda row: f"{row.flop_ratio:.2f}x",
            "Reached": lambda row: f"{row.share:.0%}",
            "Weights": lambda row: f"{row.weight_bytes / 1e6:.1f}",
            "Activations": lambda row: "-" if row.activation_bytes is None else f"{row.activation_bytes / 1e6:.1f}",
        }
        return markdown_table([*columns], ([cell(row) for cell in columns.values()] for row in rows), 2)


def _shortfall(row: ServingRow) -> str:
    reached = f"{row.runtime_speedup:.2f}x of {row.flop_ratio:.2f}x ({row.share:.0%})"
    return f"- {row.model}, {row.runtime}: {reached}"


def figures_of(result: ServingResult, about: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what was measured as plain values.

    Args:
        result: From `measure_serving`.
        about: Machine, versions, date and command.
    """
    return {"about": dict(about), "agreement": dict(result.agreement), "rows": [row.summary() for row in result.rows]}


def write_serving(result: ServingResult, about: Mapping[str, Any], output: Path) -> None:
    """Writes `benchmark.md`, `benchmark.json` and `benchmark.png` into a directory.

    Args:
        result: From `measure_serving`.
        about: Machine, versions, date and command, without which a time means nothing.
        output: The directory.

    Raises:
        ImportError: matplotlib is not installed; the other two files are there.
    """
    output.mkdir(parents=True, exist_ok=True)
    lines = "\n".join(f"- {name}: {value}" for name, value in about.items())
    write_text(output / "benchmark.md", f"# Benchmark\n\n{lines}\n\n{result.markdown()}")
    write_text(output / "benchmark.json", json.dumps(figures_of(result, about), indent=2) + "\n")
    panels: dict[str, dict[str, dict[str, float]]] = {}
    for row in result.rows:
        panels.setdefault(row.workload, {}).setdefault(row.runtime, {})[row.model] = row.speedup
    plot_speed(panels, output / "benchmark.png", f"{result.model} in {result.runtime}")
