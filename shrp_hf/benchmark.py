"""What a model costs: parameters in three conventions, FLOPs, time, memory, and the table that compares models."""

import copy
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

NUM_WARMUP_CALLS = 3
MIN_ROUND_SECONDS = 0.2
MAX_CALLS_PER_ROUND = 50
Z_95 = 1.959963984540054

Progress = Callable[[int, int], object]


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a base model, without its task head, in the conventions that papers use.

    SHRP's 88.5% (arXiv 2512.20635) is of `encoder_and_pooler`; it is 69.2% of `whole`: always show all three.

    Args:
        encoder: The layers, with whatever stands between embeddings and pooler.
        encoder_and_pooler: The same and the pooler, where the model has one.
        whole: The whole base model, embeddings included.
        embeddings: The embeddings.
    """

    encoder: int
    encoder_and_pooler: int
    whole: int
    embeddings: int

    def reduction_from(self, baseline: "ParameterCount") -> dict[str, float]:
        """Returns the share of the baseline's parameters that is gone, 0 to 1, in each convention."""
        names = ("encoder", "encoder_and_pooler", "whole")
        return {name: 1 - getattr(self, name) / getattr(baseline, name) for name in names}


def count_parameters(model: nn.Module) -> ParameterCount:
    """Counts parameters, shared ones once; router usage and other buffers are not parameters.

    Args:
        model: A base model or one with a task head (not counted), on any device, "meta" included.

    Raises:
        ValueError: The base model has no `embeddings` module, so the conventions do not apply.
    """
    base = _base_model(model)
    if not isinstance(getattr(base, "embeddings", None), nn.Module):
        raise ValueError(f"`model` must be an encoder with an `embeddings` module, got {type(base).__name__}.")
    whole = _num_parameters(base)
    embeddings = _num_parameters(base.embeddings)
    pooler = _num_parameters(getattr(base, "pooler", None))
    return ParameterCount(whole - embeddings - pooler, whole - embeddings, whole, embeddings)


def count_flops(model: nn.Module, batch_size: int, length: int) -> int:
    """Counts the FLOPs of one forward pass, task head included; a multiply-add is 2.

    Counted while the model runs in eager attention, because torch's counter does not see sdpa on CPU; the model's own
    attention implementation, its training flags and its usage counters are as before afterwards.

    Args:
        model: A Transformers model on any device; on "meta" nothing is computed.
        batch_size: Sequences (images) in the batch.
        length: Tokens per sequence; an image model ignores it, its config says how many patches there are.

    Raises:
        ValueError: `batch_size` or `length` is below 1, or `length` is longer than the model's positions.
    """
    inputs = random_inputs(model, batch_size, length)
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with _evaluating(model), torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(**inputs)
    finally:
        model.set_attn_implementation(implementation)
    return counter.get_total_flops()


def random_inputs(model: nn.Module, batch_size: int, length: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Draws a batch that fits a model: token ids (batch, length), or pixels (batch, channels, height, width).

    No id is the padding token, so every model of a comparison sees `batch_size * length` real tokens.

    Raises:
        ValueError: `batch_size` or `length` is below 1, or `length` is longer than the model's positions.
    """
    config = model.config
    for name, value in (("batch_size", batch_size), ("length", length)):
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
    weight = next(model.parameters())
    generator = torch.Generator().manual_seed(seed)
    if getattr(model, "main_input_name", "input_ids") == "pixel_values":
        size = config.image_size if isinstance(config.image_size, Sequence) else (config.image_size,) * 2
        pixels = torch.randn(batch_size, config.num_channels, *size, generator=generator)
        return {"pixel_values": pixels.to(weight.device, weight.dtype)}
    longest = getattr(config, "max_position_embeddings", length)
    if length > longest:
        raise ValueError(f"`length` must be at most {longest}, the positions that the model has, got {length}.")
    ids = torch.randint(config.vocab_size, (batch_size, length), generator=generator)
    ids[ids == config.pad_token_id] = ((config.pad_token_id or 0) + 1) % config.vocab_size
    if type(model).__name__.endswith("ForMultipleChoice"):
        ids = ids.unsqueeze(1)  # one choice
    return {"input_ids": ids.to(weight.device)}


@dataclass(frozen=True)
class Timing:
    """How long one model took, in a run that it shared with the models it is compared with.

    Args:
        name: The model's name in that run.
        batch_size: Sequences per call.
        length: Tokens per sequence.
        device: Where it ran, for example "cpu".
        num_threads: CPU threads that torch used within an operator.
        seconds: Seconds per call, one tuple per round.
    """

    name: str
    batch_size: int
    length: int
    device: str
    num_threads: int
    seconds: tuple[tuple[float, ...], ...]

    @property
    def p50(self) -> float:
        """Median latency in seconds."""
        return self._quantile(0.5)

    @property
    def p95(self) -> float:
        """95th percentile of the latency in seconds."""
        return self._quantile(0.95)

    @property
    def spread(self) -> float:
        """Distance between the quartiles of the latency as a share of its median."""
        return (self._quantile(0.75) - self._quantile(0.25)) / self.p50

    @property
    def sequences_per_second(self) -> float:
        """Throughput at the median latency."""
        return self.batch_size / self.p50

    def ratio_to(self, baseline: "Timing") -> float:
        """How many times the baseline's throughput this is: the median over rounds of the ratio within a round.

        Models take turns within a round, so a machine that slows down in mid-run slows both and the ratio holds.

        Raises:
            ValueError: The two were not measured in the same run.
        """
        mine, other = ((t.batch_size, t.length, t.device, t.num_threads, len(t.seconds)) for t in (self, baseline))
        if mine != other:
            raise ValueError(
                f"`baseline` must come from the same run: (batch, length, device, threads, rounds) are {other} "
                f"for {baseline.name!r} and {mine} for {self.name!r}. Measure both in one call."
            )
        pairs = zip(self.seconds, baseline.seconds, strict=True)
        return statistics.median(statistics.median(b) / statistics.median(a) for a, b in pairs)

    def summary(self) -> dict[str, float | int | str]:
        """Returns the figures without the single calls, ready for JSON; times in milliseconds."""
        return {
            "name": self.name,
            "batch_size": self.batch_size,
            "length": self.length,
            "device": self.device,
            "num_threads": self.num_threads,
            "p50_ms": 1e3 * self.p50,
            "p95_ms": 1e3 * self.p95,
            "spread": self.spread,
            "sequences_per_second": self.sequences_per_second,
            "num_rounds": len(self.seconds),
        }

    def _quantile(self, q: float) -> float:
        calls = [second for calls in self.seconds for second in calls]
        return torch.tensor(calls, dtype=torch.float64).quantile(q).item()


def measure_throughput(
    models: Mapping[str, nn.Module],
    batch_size: int,
    length: int,
    *,
    num_rounds: int = 10,
    num_threads: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Timing]:
    """Times the forward pass of several models in one run: warm, in turns, in inference mode, on the same random ids.

    Ratios between models are worth more than the times: take them from one call of this function.

    Args:
        models: The models under the names that the result will carry. Their training flags are restored.
        batch_size: Sequences per call.
        length: Tokens per sequence.
        num_rounds: Rounds; in each every model runs for about 0.2 seconds, at least once.
        num_threads: CPU threads within an operator; None leaves torch's setting.
        progress: Called with (turns done, turns in all) after each model's turn.

    Raises:
        ValueError: No model, or a count below 1.
    """
    calls = {}
    for name, model in models.items():
        inputs = random_inputs(model, batch_size, length)
        calls[name] = lambda model=model, inputs=inputs: model(**inputs)
    with _evaluating(*models.values()), torch.inference_mode():
        return _timings(models, calls, (batch_size, length), num_rounds, num_threads, progress)


def measure_training_step(
    models: Mapping[str, nn.Module],
    batch_size: int,
    length: int,
    *,
    num_rounds: int = 5,
    num_threads: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Timing]:
    """Times a training step (forward, backward, AdamW) as `measure_throughput` times the forward pass.

    The arguments are the same. It works on copies, because a step changes a model, and needs memory to train them all.
    """
    calls = {name: training_step(copy.deepcopy(model), batch_size, length) for name, model in models.items()}
    return _timings(models, calls, (batch_size, length), num_rounds, num_threads, progress)


def training_step(model: nn.Module, batch_size: int, length: int) -> Callable[[], None]:
    """Returns a call that does one training step of `model` on random input: forward, backward, fused AdamW.

    The loss is the model's own for sequence classification, and the mean logsumexp of the first output for anything
    else. Puts the model in training mode, and each call changes it.
    """
    inputs = random_inputs(model, batch_size, length)
    if type(model).__name__.endswith("ForSequenceClassification"):
        dtype = torch.float if model.config.num_labels == 1 else torch.long
        inputs["labels"] = torch.zeros(batch_size, dtype=dtype, device=model.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    model.train()

    def step() -> None:
        outputs = model(**inputs)
        loss = outputs.loss if "labels" in inputs else outputs[0].logsumexp(dim=-1).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def peak_memory(call: Callable[[], object], device: str | torch.device = "cpu") -> int:
    """Returns the most bytes that `call` held at any moment, beyond what was held before it.

    To include a model's weights, gradients and optimizer states, build them inside the call and do two training steps:
    the first one creates the optimizer's states.

    On a GPU it reads torch's allocator. On a CPU it adds up the allocations and releases in the record of torch's
    profiler: exact and repeatable, while the resident set of a process (`ru_maxrss`) never shrinks, counts libraries
    and keeps freed pages, which hides differences of a few percent. Scratch memory of math libraries is not seen.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def accuracy_interval(num_correct: int, total: int) -> tuple[float, float]:
    """Returns the 95% Wilson score interval of an accuracy, (low, high), both from 0 to 1.

    It stays inside [0, 1] and is not empty at 0 or all correct, where the normal interval is.

    Raises:
        ValueError: `total` is below 1, or `num_correct` is not between 0 and `total`.
    """
    if total < 1 or not 0 <= num_correct <= total:
        raise ValueError(f"`num_correct` must be from 0 to `total`, and `total` at least 1, got {num_correct} of {total}.")
    share = num_correct / total
    spread = Z_95 * math.sqrt(share * (1 - share) / total + Z_95**2 / (4 * total**2))
    scale = 1 + Z_95**2 / total
    centre = share + Z_95**2 / (2 * total)
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


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


def report_table(rows: Sequence[ModelReport]) -> str:
    """Returns a Markdown table of the rows; reductions and ratios are against the first one.

    Accuracy (with its 95% interval) and throughput are columns only if a row has them. Next to a throughput ratio
    stands how much of the FLOP ratio it reaches: fewer FLOPs are not yet lower latency.

    Raises:
        ValueError: No row; or a row has a timing and the first has none, or one from another run.
    """
    if not rows:
        raise ValueError("`rows` must hold at least one model, got none.")
    columns: dict[str, Callable[[ModelReport], str]] = {"Model": lambda row: row.name}
    if any(row.correct for row in rows):
        columns["Accuracy (95% interval)"] = _accuracy_cell
    first = rows[0]
    for title, field in (("Encoder", "encoder"), ("Encoder + pooler", "encoder_and_pooler"), ("Whole model", "whole")):
        columns[title] = partial(_count_cell, baseline=first.parameters, field=field)
    columns["FLOPs"] = lambda row: f"{row.flops / 1e9:,.2f} G ({row.flops / first.flops:.1%})"
    if any(row.timing for row in rows):
        if first.timing is None:
            raise ValueError(f"`rows[0]` ({first.name!r}) must have a timing when others do: ratios are against it.")
        columns["Throughput"] = lambda row: _throughput_cell(row, first)
    lines = [" | ".join(columns), " | ".join(["---"] + ["---:"] * (len(columns) - 1))]
    lines += [" | ".join(cell(row) for cell in columns.values()) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


def _accuracy_cell(row: ModelReport) -> str:
    if row.correct is None:
        return "-"
    low, high = accuracy_interval(*row.correct)
    return f"{row.correct[0] / row.correct[1]:.3f} ({low:.3f} to {high:.3f})"


def _count_cell(row: ModelReport, baseline: ParameterCount, field: str) -> str:
    reduction = row.parameters.reduction_from(baseline)[field]
    return f"{getattr(row.parameters, field):,}" + (f" ({-reduction:+.1%})" if reduction else "")


def _throughput_cell(row: ModelReport, baseline: ModelReport) -> str:
    if row.timing is None:
        return "-"
    ratio = row.timing.ratio_to(baseline.timing)
    limit = baseline.flops / row.flops
    return f"{ratio:.2f}x" + (f" ({ratio / limit:.0%} of the FLOP ratio)" if limit != 1 else "")


def _timings(
    models: Mapping[str, nn.Module],
    calls: Mapping[str, Callable[[], object]],
    shape: tuple[int, int],
    num_rounds: int,
    num_threads: int | None,
    progress: Progress | None,
) -> dict[str, Timing]:
    before = torch.get_num_threads()
    threads = before if num_threads is None else num_threads
    if not calls or num_rounds < 1 or threads < 1:
        raise ValueError(
            f"At least one model, round and thread are needed, got `models` {list(calls)}, `num_rounds` {num_rounds}, "
            f"`num_threads` {num_threads}."
        )
    devices = {name: next(model.parameters()).device for name, model in models.items()}
    torch.set_num_threads(threads)
    try:
        seconds = _time_in_turns(calls, num_rounds, any(d.type == "cuda" for d in devices.values()), progress)
    finally:
        torch.set_num_threads(before)
    return {name: Timing(name, *shape, str(devices[name]), threads, seconds[name]) for name in calls}


def _time_in_turns(
    calls: Mapping[str, Callable[[], object]], num_rounds: int, synchronize: bool, progress: Progress | None
) -> dict[str, tuple[tuple[float, ...], ...]]:
    wait = torch.cuda.synchronize if synchronize else lambda: None

    def timed(call: Callable[[], object]) -> float:
        wait()
        start = time.perf_counter()
        call()
        wait()
        return time.perf_counter() - start

    repeats = {}
    for name, call in calls.items():
        warm = min(timed(call) for _ in range(NUM_WARMUP_CALLS))
        repeats[name] = max(1, min(MAX_CALLS_PER_ROUND, round(MIN_ROUND_SECONDS / warm)))
    seconds: dict[str, list[tuple[float, ...]]] = {name: [] for name in calls}
    for turn in range(num_rounds * len(calls)):
        name = list(calls)[turn % len(calls)]
        if repeats[name] > 1:
            calls[name]()  # untimed: the previous model has pushed this one's weights out of the cache
        seconds[name].append(tuple(timed(calls[name]) for _ in range(repeats[name])))
        if progress is not None:
            progress(turn + 1, num_rounds * len(calls))
    return {name: tuple(rounds) for name, rounds in seconds.items()}


@contextmanager
def _evaluating(*models: nn.Module) -> Iterator[None]:
    flags = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


def _base_model(model: nn.Module) -> nn.Module:
    while (base := getattr(model, "base_model", model)) is not model:  # PEFT and task heads nest
        model = base
    return model


def _num_parameters(module: nn.Module | None) -> int:
    return 0 if module is None else sum(parameter.numel() for parameter in module.parameters())
