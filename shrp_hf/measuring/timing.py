"""How long calls take, in turns within one run: `Timing`, and what measures it."""

import copy
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from shrp_hf.measuring.cost import evaluating, random_inputs
from shrp_hf.models.outputs import SINGLE_LABEL, problem_type

NUM_WARMUP_CALLS = 3
MIN_ROUND_SECONDS = 0.2
MAX_CALLS_PER_ROUND = 50

Progress = Callable[[int, int], object]


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
    options: dict[str, Any] = {"num_rounds": num_rounds, "num_threads": num_threads, "progress": progress}
    calls = {}
    for name, model in models.items():
        inputs = random_inputs(model, batch_size, length)
        calls[name] = lambda model=model, inputs=inputs: model(**inputs)
    with evaluating(*models.values()), torch.inference_mode():
        return measure_calls(calls, batch_size, length, devices=_devices(models), **options)


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
    options: dict[str, Any] = {"num_rounds": num_rounds, "num_threads": num_threads, "progress": progress}
    calls = {name: training_step(copy.deepcopy(model), batch_size, length) for name, model in models.items()}
    return measure_calls(calls, batch_size, length, devices=_devices(models), **options)


def training_step(model: nn.Module, batch_size: int, length: int) -> Callable[[], None]:
    """Returns a call that does one training step of `model` on random input: forward, backward, fused AdamW.

    The loss is the model's own for sequence classification, and the mean logsumexp of the first output for anything
    else. Puts the model in training mode, and each call changes it.
    """
    inputs = random_inputs(model, batch_size, length)
    if type(model).__name__.endswith("ForSequenceClassification"):
        count, is_class = model.config.num_labels, problem_type(model) == SINGLE_LABEL
        size = (batch_size,) if is_class or count == 1 else (batch_size, count)
        inputs["labels"] = torch.zeros(size, dtype=torch.long if is_class else torch.float, device=model.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    model.train()

    def step() -> None:
        outputs = model(**inputs)
        loss = outputs.loss if "labels" in inputs else outputs[0].logsumexp(dim=-1).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure_calls(
    calls: Mapping[str, Callable[[], object]],
    batch_size: int,
    length: int,
    *,
    devices: Mapping[str, torch.device] | None = None,
    num_rounds: int = 10,
    num_threads: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Timing]:
    """Times calls of any kind as `measure_throughput` times models: warm, in turns, in one run.

    On a GPU a call is timed between two events on its stream, after everything before it has ended.

    Args:
        calls: The calls under the names that the result will carry.
        batch_size: Sequences that a call works through.
        length: Tokens per sequence, the longest where they differ.
        devices: Name -> where the call runs; None: all on the CPU.
        num_rounds: Rounds; in each every call is repeated for about 0.2 seconds, at least once.
        num_threads: CPU threads within an operator of torch; None leaves torch's setting.
        progress: Called with (turns done, turns in all) after each turn.

    Raises:
        ValueError: No call, or a count below 1.
    """
    before = torch.get_num_threads()
    threads = before if num_threads is None else num_threads
    if not calls or num_rounds < 1 or threads < 1:
        raise ValueError(
            f"At least one model, round and thread are needed, got `models` {list(calls)}, `num_rounds` {num_rounds}, "
            f"`num_threads` {num_threads}."
        )
    places = {name: torch.device("cpu") for name in calls} | dict(devices or {})
    torch.set_num_threads(threads)
    try:
        seconds = _time_in_turns(calls, places, num_rounds, progress)
    finally:
        torch.set_num_threads(before)
    return {name: Timing(name, batch_size, length, str(places[name]), threads, seconds[name]) for name in calls}


def _devices(models: Mapping[str, nn.Module]) -> dict[str, torch.device]:
    return {name: next(model.parameters()).device for name, model in models.items()}


def _seconds_on_cpu(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _seconds_on_gpu(call: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3  # it counts in milliseconds


def _time_in_turns(
    calls: Mapping[str, Callable[[], object]],
    places: Mapping[str, torch.device],
    num_rounds: int,
    progress: Progress | None,
) -> dict[str, tuple[tuple[float, ...], ...]]:
    timers = {name: _seconds_on_gpu if place.type == "cuda" else _seconds_on_cpu for name, place in places.items()}
    repeats = {}
    for name, call in calls.items():
        warm = min(timers[name](call) for _ in range(NUM_WARMUP_CALLS))
        repeats[name] = max(1, min(MAX_CALLS_PER_ROUND, round(MIN_ROUND_SECONDS / warm)))
    seconds: dict[str, list[tuple[float, ...]]] = {name: [] for name in calls}
    for turn in range(num_rounds * len(calls)):
        name = list(calls)[turn % len(calls)]
        if repeats[name] > 1:
            calls[name]()  # untimed: the previous model has pushed this one's weights out of the cache
        seconds[name].append(tuple(timers[name](calls[name]) for _ in range(repeats[name])))
        if progress is not None:
            progress(turn + 1, num_rounds * len(calls))
    return {name: tuple(rounds) for name, rounds in seconds.items()}
