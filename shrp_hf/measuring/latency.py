"""The table that is measured: seconds of a layer by heads and neurons, on this machine, at the served shape and runtime."""

import hashlib
import importlib.metadata
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import constants
from transformers import PreTrainedModel
from transformers.utils import logging

from shrp_hf.export.runtime import EXTRA
from shrp_hf.families import HeadLayout, head_layout
from shrp_hf.files import writing_to
from shrp_hf.measuring.cost import random_inputs
from shrp_hf.measuring.cost_table import CostTable
from shrp_hf.measuring.environment import environment
from shrp_hf.measuring.ladder import Clock, build_ladder, time_eager
from shrp_hf.measuring.timing import Progress
from shrp_hf.plans.budget import Serving
from shrp_hf.pruning import to_shrp

NEURON_STEP = 32  # multiples of 8 are fast on CPUs, and of 32 nowhere slower (docs/benchmarks-serving.md)
_GRID = 64
_STEPS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
_MOST_HEAD_COUNTS = 17
_WHOLE_LAYERS = 2
_WARMUP_CALLS = 2
_MIN_CALLS, _MAX_CALLS = 7, 50
_SECONDS = 10.0
_MOST_SCATTER = 0.2  # quartiles of whole calls, of their median
logger = logging.get_logger(__name__)


def latency_table(
    model: PreTrainedModel,
    at: Serving | None = None,
    *,
    folder: str | Path | None = None,
    anew: bool = False,
    progress: Progress | None = None,
) -> CostTable:
    """Returns the time of a layer by its heads and neurons, measured once on this machine and kept in a file.

    One model with layers of many sizes is built with random weights and called again and again; each layer is timed where
    it stands, so that all take turns and none finds its weights in the cache. A number is the median over the calls. Let
    the machine do nothing else meanwhile: where the calls scatter, the table is returned with a warning, and not kept.

    Args:
        model: A supported encoder on the CPU: its sizes, dtype, attention implementation and task head are measured.
        at: Batch, length, runtime and threads; None: 8 x 128 in PyTorch eager.
        folder: Where tables are kept; None: `shrp_hf/latency` beside the Hugging Face cache (`HF_HOME`). A table is found
            again only by the same processor, threads, versions, shape, runtime and sizes.
        anew: Measure even if there is a table, and replace it.
        progress: Called with (calls done, calls in all); None shows a bar on a terminal.

    Raises:
        ImportError: The runtime needs the extra `onnx`.
        ValueError: The family is not supported, the model is not on the CPU, the shape does not suit it, or the file is
            damaged.
    """
    at = Serving() if at is None else at
    if model.device.type != "cpu":
        raise ValueError(
            f"`model` is on {model.device}, but tables are measured on the CPU: move it there, or measure plans yourself "
            "with `Budget.latency(measure, ...)`."
        )
    layout = head_layout(model)
    random_inputs(model, at.batch_size, at.length)  # refuses a shape that does not suit
    threads = at.num_threads or torch.get_num_threads()
    about = _about(model, layout, at, threads)
    folder = Path(constants.HF_HOME) / "shrp_hf" / "latency" if folder is None else Path(folder)
    path = folder / f"{hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:20]}.json"
    if path.exists() and not anew:
        table = CostTable.from_json(path)
        if dict(table.about) == about and set(_expert_counts(layout)) <= set(table.experts or ()):
            return table
    with writing_to(path):
        folder.mkdir(parents=True, exist_ok=True)
    table, scatter = _measured(model, layout, at, about, progress)
    if scatter <= _MOST_SCATTER:
        table.to_json(path)
    else:
        logger.warning(
            f"The times of layers scatter by {scatter:.0%} (half of the calls): something else runs here. The table is "
            "used, but not kept; measure again when it rests, and trust no plan before its own speed was measured."
        )
    return table


def warn_of_another_machine(table: CostTable) -> None:
    """Says so, once for each, where a table was measured on another machine than this one.

    Args:
        table: A table that the caller was handed.
    """
    here, there = environment()["machine"], table.about.get("machine")
    if there not in (None, here):
        logger.warning_once(f"The table of times was measured on another machine ({there}) than this one ({here}).")


def _about(model: PreTrainedModel, layout: HeadLayout, at: Serving, num_threads: int) -> dict[str, Any]:
    """All that the times depend on, but for the number of layers, of heads and of neurons."""
    config = model.config
    names = ["torch", "transformers", "shrp_hf"] + ["onnxruntime"] * (at.runtime != "eager")
    try:
        versions = {name: importlib.metadata.version(name) for name in names}
    except importlib.metadata.PackageNotFoundError as error:
        raise ImportError(EXTRA) from error
    return {
        "machine": environment()["machine"],
        "threads": num_threads,
        "runtime": at.runtime,
        "batch_size": at.batch_size,
        "length": at.length,
        "dtype": str(model.dtype).removeprefix("torch."),
        **versions,
        "model": type(model).__name__.removeprefix("Shrp"),
        "attention": config._attn_implementation if at.runtime == "eager" else None,
        "hidden_size": config.hidden_size,
        "num_heads": layout.num_heads,
        "head_size": layout.head_size,
        "num_neurons": to_shrp(model).config.ffn_width,
        "vocab_size": getattr(config, "vocab_size", None),
        "num_labels": config.num_labels,
    }


def _measured(
    model: PreTrainedModel, layout: HeadLayout, at: Serving, about: dict[str, Any], progress: Progress | None
) -> tuple[CostTable, float]:
    """Builds the ladder, times it, and makes the table of what its layers took; also says how far the calls scatter."""
    heads, neurons, experts = _head_counts(layout.num_heads), _widths(about["num_neurons"]), _expert_counts(layout)
    few_heads, few_neurons = heads[len(heads) // 2], neurons[-1] // 2 // _GRID * _GRID or neurons[-1]
    parts = {
        "heads": [(count, few_neurons) for count in heads],
        "neurons": [(few_heads, count) for count in neurons],
        "whole": [(heads[-1], neurons[-1])] * _WHOLE_LAYERS,
    }
    before, after, taken, scatter = _timed(model, sum(parts.values(), []), experts, at, about, progress)
    found = {name: [taken.pop(0) for _ in layers] for name, layers in parts.items()}
    by_heads, by_neurons = found["heads"], found["neurons"]
    # Most time goes into whole layers, and shares are of them: what they take is not left to the one at the ladder's end.
    more = by_heads[-1] - by_heads[heads.index(few_heads)]
    by_neurons[-1] = float(np.mean([by_neurons[-1], *(whole - more for whole in found["whole"])]))
    by_heads, by_neurons = _rising(by_heads), _rising(by_neurons)
    table = CostTable(
        unit="seconds",
        fixed=before + after,
        layer=max(0.0, by_heads[0] + by_neurons[0] - by_heads[heads.index(few_heads)]),
        heads=heads,
        attention=tuple(time - by_heads[0] for time in by_heads),
        neurons=neurons,
        ffn=tuple(time - by_neurons[0] for time in by_neurons),
        experts=dict(zip(experts, taken, strict=True)),
        about=about,
    )
    return table, scatter


def _timed(
    model: PreTrainedModel,
    layers: Sequence[tuple[int, int]],
    experts: Sequence[int],
    at: Serving,
    about: Mapping[str, Any],
    progress: Progress | None,
) -> tuple[float, float, list[float], float]:
    """Returns the seconds of what comes before the layers of a ladder, of what comes after, of each layer, and the scatter."""
    ladder = build_ladder(model, layers, experts)
    inputs = random_inputs(ladder, at.batch_size, at.length)
    threads_before = torch.get_num_threads()
    torch.set_num_threads(about["threads"])
    try:
        with tempfile.TemporaryDirectory(prefix="shrp-latency-") as folder:
            if at.runtime == "eager":
                clock = time_eager(ladder, inputs)
            else:
                from shrp_hf.measuring.onnx_ladder import time_onnx

                clock = time_onnx(ladder, inputs, Path(folder), about["threads"], int8=at.runtime == "int8")
            seconds, scatter = _medians(clock, f"timing layers at {at.batch_size} x {at.length} in {at.runtime}", progress)
    finally:
        torch.set_num_threads(threads_before)
    return seconds[0], seconds[-1], seconds[1:-1], scatter


def _rising(times: Sequence[float]) -> list[float]:
    """The nearest times, in squares, that never fall as the layer grows: what falls is noise (pool adjacent violators)."""
    pools: list[tuple[float, int]] = []
    for value in times:
        mean, count = value, 1
        while pools and pools[-1][0] > mean:
            before, size = pools.pop()
            mean, count = (before * size + mean * count) / (size + count), size + count
        pools.append((mean, count))
    return [mean for mean, count in pools for _ in range(count)]


def _expert_counts(layout: HeadLayout) -> list[int]:
    return sorted({len(layout.kept[i]) for i in layout.expert_layers})


def _head_counts(total: int) -> tuple[int, ...]:
    return tuple(sorted({round(total * i / (_MOST_HEAD_COUNTS - 1)) for i in range(_MOST_HEAD_COUNTS)} | {0, 1, total}))


def _widths(total: int) -> tuple[int, ...]:
    return (0, *(_GRID * step for step in _STEPS if _GRID * step < total), total)


def _medians(clock: Clock, doing: str, progress: Progress | None) -> tuple[list[float], float]:
    """Calls the ladder for some ten seconds; returns the median of each of its parts, and how far whole calls scatter."""
    warm = min(sum(clock()) for _ in range(_WARMUP_CALLS))
    num_calls = min(_MAX_CALLS, max(_MIN_CALLS, round(_SECONDS / warm)))
    calls = []
    with logging.tqdm(total=num_calls, desc=doing, unit="call", leave=False, disable=True if progress else None) as bar:
        for done in range(num_calls):
            calls.append(clock())
            bar.update()
            if progress is not None:
                progress(done + 1, num_calls)
    low, middle, high = np.quantile(np.sum(calls, axis=1), (0.25, 0.5, 0.75))
    return [float(median) for median in np.median(calls, axis=0)], float((high - low) / middle)
