"""`measure_serving`: every model in every runtime, in turns within one run for each workload."""

import copy
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from shrp_hf.defaults import BATCH_SIZE, ROUNDS, SERVED_SHAPE
from shrp_hf.export import ExportRows, export_model
from shrp_hf.export.sentences import SENTENCES
from shrp_hf.measuring import measure_calls
from shrp_hf.measuring.runtimes import EXPORTED, RUNTIMES, FileRunner, Runner, TorchRunner
from shrp_hf.measuring.workloads import Workload, count_flops_of
from shrp_hf.models.lengths import fitting_length
from shrp_hf.workflows.benchmark.results import ServingResult, ServingRow

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
COMPILED_SHAPES = 4096  # torch gives up at 8 graphs of one module's code, and stock models share theirs

Served = Mapping[str, tuple[PreTrainedModel, Any]]
Watch = Callable[[str, int, int], object]


@dataclass(frozen=True)
class ServingOptions:
    """What is measured, and how.

    Args:
        runtimes: Of "eager", "compiled", "onnx", "int8", "openvino" and "openvino-int8" (static int8, whose scales are found
            on `texts` or built-in sentences); the first is the baseline's.
        shapes: (batch, length) of each workload; at batch 1 the times are a request's latency.
        texts: Sentences that make one more workload, sorted by length and batched, as a server would.
        batch_size: Sentences per batch.
        max_length: Most tokens of a sentence that are read; None: as many as the model has positions for.
        num_threads: CPU threads within an operator, of every runtime; None: torch's setting.
        device: Where PyTorch runs, for example "cpu" or "cuda".
        dtype: "float32", "bfloat16" or "float16", of PyTorch's weights; files are float32 or int8.
        num_rounds: Rounds in which the models take turns.

    Raises:
        ValueError: An argument is out of range, or the runtimes do not run on the device.
    """

    runtimes: tuple[str, ...] = ("eager",)
    shapes: tuple[tuple[int, int], ...] = ((1, 32), SERVED_SHAPE)
    texts: tuple[str, ...] = ()
    batch_size: int = BATCH_SIZE
    max_length: int | None = None
    num_threads: int | None = None
    device: str = "cpu"
    dtype: str = "float32"
    num_rounds: int = ROUNDS

    def __post_init__(self) -> None:
        unknown = [name for name in self.runtimes if name not in RUNTIMES]
        if unknown or not self.runtimes or len(set(self.runtimes)) < len(self.runtimes):
            raise ValueError(f"`runtimes` must be of {', '.join(RUNTIMES)}, each once, got {list(self.runtimes)}.")
        if not self.shapes and not self.texts:
            raise ValueError("Give `shapes`, `texts`, or both: there is nothing to run.")
        counts = {"batch_size": self.batch_size, "num_rounds": self.num_rounds}
        counts |= {"max_length": self.max_length, "num_threads": self.num_threads}
        for name, value in counts.items():
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        for shape in self.shapes:
            if len(shape) != 2 or min(shape) < 1:
                raise ValueError(f"`shapes` must be (batch, length), both at least 1, got {shape}.")
        if self.dtype not in DTYPES:
            raise ValueError(f"`dtype` must be one of {', '.join(DTYPES)}, got {self.dtype!r}.")
        on_cpu = [name for name in self.runtimes if name in EXPORTED]
        if on_cpu and torch.device(self.device).type != "cpu":
            raise ValueError(
                f"`runtimes` {on_cpu} run on the CPU, and `device` is {self.device!r}: measure them in a run of their own."
            )
        if torch.device(self.device).type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"`device` is {self.device!r}, and torch sees no GPU: leave it out to measure on the CPU.")

    @property
    def workloads(self) -> list[Workload]:
        """The shapes, then the sentences."""
        found = [Workload(*shape) for shape in self.shapes]
        return found + ([Workload(self.batch_size, self.max_length, self.texts)] if self.texts else [])


def measure_serving(
    models: Served,
    options: ServingOptions,
    *,
    exports: Path | None = None,
    watch: Watch = lambda doing, done, total: None,
) -> ServingResult:
    """Measures models in runtimes; per workload all of them take turns in one run, so its ratios hold.

    Args:
        models: Name -> model and tokenizer; the first is the baseline. They are left as they are.
        options: What is measured, and how.
        exports: Directory to keep the files in, a folder each; None: they are removed.
        watch: Called with what is being done, steps done and steps in all.

    Returns:
        A row per workload, model and runtime.

    Raises:
        ValueError: There is no model, or one does not suit a workload; before anything is measured.
        ImportError, RuntimeError: As `export_model`.
    """
    if not models:
        raise ValueError("`models` must hold at least one model, got none.")
    options = _fitting(options, models)
    batches = {
        name: [workload.batches(model, processor) for workload in options.workloads]
        for name, (model, processor) in models.items()
    }
    folder = Path(tempfile.mkdtemp(prefix="shrp-serving-")) if exports is None else exports
    try:
        runners, agreement = _open_all(models, options, folder, watch)
        result = ServingResult(list(models)[0], options.runtimes[0], [], agreement)
        for i, workload in enumerate(options.workloads):
            flops = {name: count_flops_of(model, batches[name][i]) for name, (model, _) in models.items()}
            result.rows.extend(
                _measure(workload, {name: made[i] for name, made in batches.items()}, runners, flops, options, watch)
            )
    finally:
        if exports is None:
            shutil.rmtree(folder, ignore_errors=True)
    return result


def _fitting(options: ServingOptions, models: Served) -> ServingOptions:
    """Clamps the lengths to what every model can read, so that all do the same work."""
    texts = [model for model, _ in models.values() if model.main_input_name != "pixel_values"]
    shapes = [(size, fitting_length(length, texts, name="shapes")) for size, length in options.shapes]
    most = options.max_length and fitting_length(options.max_length, texts)
    return replace(options, shapes=tuple(dict.fromkeys(shapes)), max_length=most)


def _open_all(
    models: Served, options: ServingOptions, folder: Path, watch: Watch
) -> tuple[dict[tuple[str, str], Runner], dict[str, str]]:
    """Opens every model in every runtime; returns them by (model, runtime), and how far int8 files agree with PyTorch."""
    runners: dict[tuple[str, str], Runner] = {}
    agreement = {}
    threads = options.num_threads or torch.get_num_threads()
    for i, (name, (model, processor)) in enumerate(models.items()):
        served = None
        for j, runtime in enumerate(options.runtimes):
            watch(f"opening {name} in {runtime}", i * len(options.runtimes) + j, len(models) * len(options.runtimes))
            if runtime in EXPORTED:
                exported = EXPORTED[runtime]
                rows = ExportRows(calibration=options.texts or SENTENCES) if exported.precision == "int8-static" else None
                path = export_model(model, processor, folder / f"{i}-{runtime}", exported, rows)
                if exported.is_int8:
                    record = json.loads(path.with_name(f"{exported.format}.json").read_text(encoding="utf-8"))
                    found = record["agreement"]
                    agreement[f"{name}, {runtime}"] = f"{found['agreement']:.4f} ({found['measure']})"
                runners[name, runtime] = FileRunner(path, threads)
            else:
                if served is None:
                    served = copy.deepcopy(model).to(options.device, DTYPES[options.dtype])
                runners[name, runtime] = TorchRunner(served, compiled=runtime == "compiled")
    return runners, agreement


def _measure(
    workload: Workload,
    batches: Mapping[str, list],
    runners: Mapping[tuple[str, str], Runner],
    flops: Mapping[str, int],
    options: ServingOptions,
    watch: Watch,
) -> list[ServingRow]:
    torch._dynamo.reset()
    length = (
        workload.length if not workload.texts else max(b["input_ids"].shape[-1] for made in batches.values() for b in made)
    )
    with torch.inference_mode(), torch._dynamo.config.patch(recompile_limit=COMPILED_SHAPES):
        calls = {", ".join(key): runner.prepare(batches[key[0]]) for key, runner in runners.items()}
        timings = measure_calls(
            calls,
            workload.num_sequences,
            length,
            devices={", ".join(key): runner.device for key, runner in runners.items()},
            num_rounds=options.num_rounds,
            num_threads=options.num_threads,
            progress=lambda done, total: watch(workload.name, done, total),
        )
        memory = {key: runner.activation_bytes(calls[", ".join(key)]) for key, runner in runners.items()}
    found = {key: timings[", ".join(key)] for key in runners}
    first = next(iter(runners))
    return [
        ServingRow(
            model=model,
            runtime=runtime,
            workload=workload.name,
            timing=found[model, runtime],
            flops=flops[model],
            weight_bytes=runner.weight_bytes,
            activation_bytes=memory[model, runtime],
            speedup=found[model, runtime].ratio_to(found[first]),
            runtime_speedup=found[model, runtime].ratio_to(found[first[0], runtime]),
            flop_ratio=flops[first[0]] / flops[model],
        )
        for (model, runtime), runner in runners.items()
    ]
