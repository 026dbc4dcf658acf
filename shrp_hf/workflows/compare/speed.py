"""How fast the architectures of a comparison are: all in one run, in turns, on this machine."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedModel

from shrp_hf.checkpoints import open_model
from shrp_hf.defaults import SERVED_SHAPE
from shrp_hf.measuring import Progress, measure_throughput
from shrp_hf.models.lengths import num_positions
from shrp_hf.pruning import to_shrp
from shrp_hf.publishing.report import write_text
from shrp_hf.workflows.compare.architectures import Shape, empty_model
from shrp_hf.workflows.compare.claims import claim
from shrp_hf.workflows.compare.tables import Cell, Timings, group_of


def measure_speed(output: Path, cells: Sequence[Cell], num_rounds: int = 5, progress: Progress | None = None) -> Timings:
    """Times every shape among the cells against the dense model, and writes `speed.json`.

    Models with random weights stand for the cells, because speed depends on the shape alone. What an earlier call
    measured is taken from the file where that has every shape: ratios of different runs are not mixed. While another
    process measures, this one does not: it returns what there is.

    Args:
        output: Directory of the comparison.
        cells: Its cells.
        num_rounds: Rounds in which the models take turns.
        progress: Called with (turns done, turns in all).

    Returns:
        Kind of cell (its key without the seed) -> figures, `ratio` being throughput against the dense model.
    """
    shapes = {group_of(cell): Shape.of(cell) for cell in cells}
    with claim(output / "claims" / "speed.lock") as is_ours:
        if not is_ours or set(shapes) <= set(read_speed(output)):
            return read_speed(output)
        dense = _dense(output, cells)
        distinct = {shape.name: shape for shape in (Shape.of({"kept": _full(dense), "expert_layers": ()}), *shapes.values())}
        models = {name: empty_model(dense, shape) for name, shape in distinct.items()}
        batch_size, length = SERVED_SHAPE
        length = min(length, num_positions(dense) or length)
        timings = measure_throughput(models, batch_size, length, num_rounds=num_rounds, progress=progress)
        baseline = next(iter(timings.values()))
        figures = {name: {**timing.summary(), "ratio": timing.ratio_to(baseline)} for name, timing in timings.items()}
        known = {group: figures[shape.name] for group, shape in shapes.items()}
        write_text(output / "speed.json", json.dumps(known, indent=1) + "\n")
    return known


def read_speed(output: Path) -> dict[str, dict[str, Any]]:
    """What was measured before; empty where nothing was."""
    path = output / "speed.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _dense(output: Path, cells: Sequence[Cell]) -> PreTrainedModel:
    dense = next(cell for cell in cells if cell["method"] == "dense")
    folder = output / "models" / dense["key"]
    source = folder if folder.exists() else dense["settings"]["model"]
    auto = getattr(transformers, dense.get("auto", "AutoModelForSequenceClassification"))  # of cells from before other kinds
    return to_shrp(open_model(str(source), auto)[0])


def _full(dense: PreTrainedModel) -> list[range]:
    return [range(dense.config.num_attention_heads)] * dense.config.num_hidden_layers
