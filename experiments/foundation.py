"""Speed and memory of SHRP at the shape of BERT-base, with random weights on the CPU, against our targets."""

import argparse
import datetime
import json
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from torch import nn
from tqdm import tqdm
from transformers import BertConfig, BertForSequenceClassification, BertModel

from shrp_hf.measuring import (
    ModelReport,
    Timing,
    count_flops,
    count_parameters,
    measure_throughput,
    measure_training_step,
    peak_memory,
    report_table,
    training_step,
)
from shrp_hf.models.configuration_shrp_bert import ShrpBertConfig
from shrp_hf.models.modeling_shrp_bert import ShrpBertForSequenceClassification, ShrpBertModel

EXAMPLE = """example:
  python -m experiments.foundation --threads 2 --output out/foundation.json

The exit code is 1 when a target is missed. Let the machine do nothing else meanwhile: minutes, and 6 GB."""
LARGE, SMALL = (8, 128), (1, 32)  # batch size, length
BUSY_SPREAD = 0.25


@dataclass(frozen=True)
class Target:
    """One promise and what was measured: `measured` must be at least (or at most) `bound`."""

    name: str
    measured: float
    bound: float
    at_least: bool

    @property
    def is_met(self) -> bool:
        """Whether the promise holds."""
        return self.measured >= self.bound if self.at_least else self.measured <= self.bound

    def row(self) -> str:
        """Returns a row of the Markdown table."""
        sign = ">=" if self.at_least else "<="
        return f"| {self.name} | {sign} {self.bound:.2f}x | {self.measured:.3f}x | {'yes' if self.is_met else '**no**'} |"


def static(num_layers: int) -> ShrpBertConfig:
    """Describes a model whose last `num_layers` layers keep one expert each."""
    layers = list(range(12 - num_layers, 12))
    kept = [[0] if layer in layers else list(range(12)) for layer in range(12)]
    return ShrpBertConfig(expert_layers=layers, kept_heads=kept, routed=False)


def routed(num_layers: int) -> ShrpBertConfig:
    """Describes a model whose last `num_layers` layers choose one of twelve experts for each sequence."""
    return ShrpBertConfig(expert_layers=list(range(12 - num_layers, 12)))


def train_dense() -> None:
    """Does two training steps of the stock model; the second one holds everything there is to hold."""
    step = training_step(BertForSequenceClassification(BertConfig()), *LARGE)
    step()
    step()


def train_through_conversion() -> None:
    """Trains while eleven layers are converted one by one, each holding both forms until the end."""
    model = ShrpBertForSequenceClassification(ShrpBertConfig(pending_layers=list(range(1, 12))))
    step = training_step(model, *LARGE)
    step()
    step()
    for layer in range(11, 0, -1):
        model.activate_layer_(layer)
        step()


def shown(run: Callable[..., dict[str, Timing]], title: str, models: dict[str, nn.Module], *args: int, **kwargs: int) -> dict:
    """Runs a measurement behind a progress bar on stderr."""
    with tqdm(desc=title, unit="turn", leave=False) as bar:

        def advance(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return run(models, *args, progress=advance, **kwargs)


def measure(num_rounds: int, num_threads: int) -> tuple[list[Target], list[Timing], str]:
    """Measures everything.

    Returns:
        The targets, the timings behind them, and the Markdown table of the models.
    """
    configs = {"routed 11/12": routed(11), "static 11/12": static(11), "static 12/12": static(12)}
    models = {"dense": BertModel(BertConfig()), **{name: ShrpBertModel(config) for name, config in configs.items()}}
    counts = {"num_rounds": num_rounds, "num_threads": num_threads}
    large = shown(measure_throughput, "8 x 128", models, *LARGE, **counts)
    pair = {name: models[name] for name in ("dense", "static 11/12")}
    small = shown(measure_throughput, "1 x 32", pair, *SMALL, **counts)
    rows = [ModelReport(n, count_parameters(m), count_flops(m, *LARGE), large[n]) for n, m in models.items()]
    models = {
        "training, dense": BertForSequenceClassification(BertConfig()),
        "training, routed 11/12": ShrpBertForSequenceClassification(routed(11)),
        "training, routed 12/12": ShrpBertForSequenceClassification(routed(12)),
    }
    train = shown(measure_training_step, "training, 8 x 128", models, *LARGE, **counts)
    del models, pair
    memory = peak_memory(train_through_conversion) / peak_memory(train_dense)

    def speed(name: str, run: dict[str, Timing], baseline: str = "dense") -> float:
        return run[name].ratio_to(run[baseline])

    def step_time(layers: str) -> float:
        return speed("training, dense", train, f"training, routed {layers}")

    targets = [
        Target("throughput, static 11/12 against dense, 8 x 128", speed("static 11/12", large), 8.0, True),
        Target("throughput, static 11/12 against dense, 1 x 32", speed("static 11/12", small), 5.5, True),
        Target("throughput, static 12/12 against dense, 8 x 128", speed("static 12/12", large), 20.0, True),
        Target("time, routed against static 11/12, 8 x 128", speed("static 11/12", large, "routed 11/12"), 1.1, False),
        Target("training-step time, routed 12/12 against dense", step_time("12/12"), 0.35, False),
        Target("training-step time, routed 11/12 against dense", step_time("11/12"), 0.35, False),
        Target("peak memory, training through the conversion against dense", memory, 1.02, False),
    ]
    return targets, [*large.values(), *small.values(), *train.values()], report_table(rows)


def environment(num_threads: int) -> dict[str, str | int]:
    """Describes the machine and the versions, without which a time means nothing."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = f"{len(names)} x {names[0]}" if names else cpu
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": cpu,
        "threads": num_threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def markdown(about: dict[str, str | int], targets: Sequence[Target], timings: Sequence[Timing], models: str) -> str:
    """Returns the report."""
    lines = [", ".join(f"{key} {value}" for key, value in about.items()), ""]
    lines += [
        "| Target | Bound | Measured | Met |",
        "| --- | ---: | ---: | --- |",
        *(target.row() for target in targets),
    ]
    lines += [
        "",
        models,
        "",
        "| Model | Batch | p50 (ms) | p95 (ms) | Spread |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for t in timings:
        lines.append(f"| {t.name} | {t.batch_size} x {t.length} | {1e3 * t.p50:.1f} | {1e3 * t.p95:.1f} | {t.spread:.1%} |")
    if max(timing.spread for timing in timings) > BUSY_SPREAD:
        lines += ["", f"**A spread is above {BUSY_SPREAD:.0%}: the machine was doing something else; run it again.**"]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(
        "python -m experiments.foundation",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=10, help="rounds in which the models take turns (default: 10)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (default: torch's)")
    parser.add_argument("--output", type=Path, help="also write the figures to this JSON file")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    targets, timings, models = measure(options.rounds, options.threads)
    about = environment(options.threads)
    sys.stdout.write(markdown(about, targets, timings, models))
    if options.output is not None:
        figures = {
            "environment": about,
            "targets": [{**asdict(target), "is_met": target.is_met} for target in targets],
            "timings": [timing.summary() for timing in timings],
        }
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0 if all(target.is_met for target in targets) else 1


if __name__ == "__main__":
    sys.exit(main())
