"""How well the table of a layer's time foretells a plan's, what widths cost, and what thin layers reach; BERT-base, CPU."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import BertConfig, BertModel, PreTrainedModel

from experiments.foundation import Target, environment
from shrp_hf.measuring import latency_table, random_inputs
from shrp_hf.measuring.ladder import build_ladder, time_eager
from shrp_hf.models.configuration_shrp_bert import ShrpBertConfig
from shrp_hf.models.modeling_shrp_bert import ShrpBertModel
from shrp_hf.plans.budget import Serving
from shrp_hf.workflows.benchmark import ServingOptions, ServingResult, measure_serving

EXAMPLE = """example:
  python -m experiments.latency plans thin widths --shapes 8x128 1x32 --runtimes eager onnx --threads 2

The weights are random. The exit code is 1 when an aim is missed. Let the machine do nothing else meanwhile."""
PARTS = ("plans", "thin", "widths")
STOCK = "stock"
NUM_PLANS = 10
TABLE_ERROR = 0.1
SHARES = {"8 x 128": 0.9, "1 x 32": 0.75}  # of the FLOP ratio, against stock in the same runtime
THIN = {"12 thin layers (3 heads, 480 neurons)": (3, 480), "half of both (6 heads, 1,536 neurons)": (6, 1536)}
WIDTHS = (448, 464, 472, 479, 480, 481, 488, 496, 500, 504, 508, 511, 512, 513, 520, 528, 544, 560, 576)

Layers = Sequence[tuple[int, int]]


def build(layers: Layers) -> PreTrainedModel:
    """A base model of these layers, (heads, neurons) each."""
    torch.manual_seed(0)
    kept, sizes = [list(range(heads)) for heads, _ in layers], [neurons for _, neurons in layers]
    return ShrpBertModel(ShrpBertConfig(kept_heads=kept, intermediate_sizes=sizes)).eval()


def random_layers(number: int) -> Layers:
    """Layers of any heads and widths, empty ones among them, from a thin model to almost the whole."""
    rng = np.random.default_rng(number)
    size = (number + 1) / NUM_PLANS
    heads = rng.binomial(12, size * rng.uniform(0.5, 1, 12))
    neurons = 32 * rng.binomial(96, size * rng.uniform(0.5, 1, 12))
    return [(int(h), int(n)) for h, n in zip(heads, neurons, strict=True)]


def serve(models: dict[str, Layers], runtime: str, shape: tuple[int, int], options: argparse.Namespace) -> ServingResult:
    """Measures stock BERT and models of these layers, in turns within one run."""
    torch.manual_seed(0)
    served = {STOCK: (BertModel(BertConfig()).eval(), None)} | {name: (build(layers), None) for name, layers in models.items()}
    wanted = ServingOptions((runtime,), (shape,), num_threads=options.threads, num_rounds=options.rounds)
    with tqdm(unit="turn", leave=False) as bar:

        def watch(doing: str, done: int, total: int) -> None:
            bar.set_description(doing)
            bar.total, bar.n = total, done
            bar.refresh()

        return measure_serving(served, wanted, watch=watch)


def foretell(runtime: str, shape: tuple[int, int], options: argparse.Namespace) -> tuple[list[str], list[Target]]:
    """Speed-up of ten random plans by the table, and as it is measured."""
    table = latency_table(BertModel(BertConfig()), Serving(*shape, runtime, options.threads), anew=True)
    plans = {f"plan {number}": random_layers(number) for number in range(NUM_PLANS)}
    result = serve(plans, runtime, shape, options)
    workload = f"{shape[0]} x {shape[1]}"
    whole = table.total([(12, 3072)] * 12)
    stock = result.row(STOCK, runtime, workload).timing.p50
    lines = [
        f"{workload}, {runtime}: stock {1e3 * stock:.0f} ms, by the table {1e3 * whole:.0f} ms",
        "",
        "| plan | heads | neurons | speed-up by the table | measured | error | time by the table | measured |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    errors = []
    for name, layers in plans.items():
        row, seconds = result.row(name, runtime, workload), table.total(layers)
        foretold, measured = whole / seconds, row.runtime_speedup
        errors.append(abs(foretold / measured - 1))
        heads, neurons = (sum(counts) for counts in zip(*layers, strict=True))
        lines.append(
            f"| {name} | {heads} | {neurons:,} | {foretold:.2f}x | {measured:.2f}x | {foretold / measured - 1:+.1%} "
            f"| {1e3 * seconds:.1f} ms | {1e3 * row.timing.p50:.1f} ms |"
        )
    what = f"largest error of a speed-up by the table, {runtime}, {workload}"
    return [*lines, ""], [Target(what, max(errors), TABLE_ERROR, at_least=False)]


def thin(runtime: str, shape: tuple[int, int], options: argparse.Namespace) -> tuple[list[str], list[Target]]:
    """What share of their FLOP ratio thin layers reach against stock in the same runtime."""
    result = serve({name: [layer] * 12 for name, layer in THIN.items()}, runtime, shape, options)
    workload = f"{shape[0]} x {shape[1]}"
    targets = []
    for name in THIN:
        row = result.row(name, runtime, workload)
        what = f"{name}, share of its FLOP ratio ({row.flop_ratio:.2f}x), {runtime}, {workload}"
        targets.append(Target(what, row.runtime_speedup / row.flop_ratio, SHARES.get(workload, 0.75), at_least=True))
    return [], targets


def widths(runtime: str, shape: tuple[int, int], options: argparse.Namespace) -> tuple[list[str], list[Target]]:
    """Time of a layer of 6 heads by the width of its FFN, in PyTorch eager."""
    if runtime != "eager":
        return [], []
    torch.set_num_threads(options.threads)
    ladder = build_ladder(BertModel(BertConfig()), [(6, width) for width in WIDTHS])
    clock = time_eager(ladder, random_inputs(ladder, *shape))
    calls = [clock() for _ in tqdm(range(options.rounds * 4 + 2), desc="widths", leave=False)][2:]
    seconds = np.median(calls, axis=0)[1:-1]
    lines = [f"{shape[0]} x {shape[1]}, {runtime}", "", "| neurons | ms | per neuron, of that at 512 |", "|---:|---:|---:|"]
    per_neuron = dict(zip(WIDTHS, seconds / np.array(WIDTHS), strict=True))
    for width, taken in zip(WIDTHS, seconds, strict=True):
        lines.append(f"| {width} | {1e3 * taken:.2f} | {per_neuron[width] / per_neuron[512]:.3f} |")
    return [*lines, ""], []


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(
        "python -m experiments.latency",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("parts", nargs="+", choices=PARTS, help="what is measured")
    parser.add_argument("--runtimes", nargs="+", default=["eager", "onnx"], help="eager, onnx, int8")
    parser.add_argument("--shapes", nargs="+", default=["8x128", "1x32"], help="batch x length")
    parser.add_argument("--rounds", type=int, default=10, help="rounds in which the models take turns (default: 10)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (default: torch's)")
    parser.add_argument("--output", type=Path, help="file for the report")
    options = parser.parse_args(arguments)
    measures = {"plans": foretell, "thin": thin, "widths": widths}
    about = environment(options.threads)
    lines, targets = [", ".join(f"{key} {value}" for key, value in about.items()), ""], []
    for part in options.parts:
        for shape in options.shapes:
            for runtime in options.runtimes:
                batch_size, length = map(int, shape.split("x"))
                found, aims = measures[part](runtime, (batch_size, length), options)
                lines += found
                targets += aims
    lines += ["| Aim | Bound | Measured | Met |", "| --- | ---: | ---: | --- |", *(target.row() for target in targets)]
    text = "\n".join(lines) + "\n"
    sys.stdout.write(text)
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(text, encoding="utf-8")
    return 0 if all(target.is_met for target in targets) else 1


if __name__ == "__main__":
    sys.exit(main())
