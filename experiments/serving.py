"""BERT-base's shape as it is served, stock against static and head-pruned, in PyTorch and ONNX Runtime, on the CPU."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import BertConfig, BertModel, PreTrainedModel

from experiments.foundation import Target, environment, static
from shrp_hf.models.configuration_shrp_bert import ShrpBertConfig
from shrp_hf.models.modeling_shrp_bert import ShrpBertModel
from shrp_hf.workflows.benchmark import ServingOptions, ServingResult, measure_serving, write_serving

EXAMPLE = """example:
  python -m experiments.serving --threads 2 --output out/serving

The weights are random. The exit code is 1 when an aim is missed. Let the machine do nothing else meanwhile."""
CONVERTED = (3, 6, 9, 11, 12)
STOCK, HALF = "stock", "half the heads"
INT8_AIMS = {"8 x 128": 18.0, "1 x 32": 12.0}  # static 11/12 in int8 against stock in PyTorch eager


def build(name: str) -> PreTrainedModel:
    """The base model that a row is called after."""
    torch.manual_seed(0)
    if name == STOCK:
        return BertModel(BertConfig()).eval()
    if name == HALF:
        return ShrpBertModel(ShrpBertConfig(kept_heads=[list(range(6))] * 12, routed=False)).eval()
    return ShrpBertModel(static(int(name.split()[1].partition("/")[0]))).eval()


def targets(result: ServingResult, options: ServingOptions, names: Sequence[str]) -> list[Target]:
    """What was promised; a FLOP ratio is compared with the speed-up within one runtime.

    That is eager, and for static models at 1 x 32 the best of those measured in float32.
    """
    found = []
    precise = [runtime for runtime in options.runtimes if runtime != "int8"]
    for workload in (workload.name for workload in options.workloads):
        is_request = workload == "1 x 32"
        eager = [name for name in names if name != STOCK] if "eager" in options.runtimes else []
        for name in eager:
            runtimes = precise if is_request and name != HALF else ["eager"]
            bound = 0.95 if name == HALF else 0.0 if name == "static 12/12" else 0.7 if is_request else 0.9
            share = max(result.row(name, runtime, workload).share for runtime in runtimes)
            what = f"{name}, share of its FLOP ratio in {' or '.join(runtimes)}, {workload}"
            found.append(Target(what, share, bound, True))
        if "int8" in options.runtimes and "static 11/12" in names and workload in INT8_AIMS:
            speedup = result.row("static 11/12", "int8", workload).speedup
            found.append(
                Target(f"static 11/12 in int8 against stock in eager, {workload}", speedup, INT8_AIMS[workload], True)
            )
        for runtime in ("onnx", "int8") if eager else ():
            if runtime not in options.runtimes:
                continue
            ratios = [result.row(n, runtime, workload).speedup / result.row(n, "eager", workload).speedup for n in eager]
            found.append(Target(f"{runtime} against eager, the least of all models, {workload}", min(ratios), 1.0, True))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(
        "python -m experiments.serving",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--runtimes", nargs="+", default=["eager", "onnx", "int8"], help="eager, compiled, onnx, int8")
    parser.add_argument("--shapes", nargs="+", default=["8x128", "32x128", "1x32"], help="batch x length")
    parser.add_argument("--converted", nargs="+", type=int, default=list(CONVERTED), help="layers converted, of 12")
    parser.add_argument("--rounds", type=int, default=15, help="rounds in which the models take turns (default: 15)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (default: torch's)")
    parser.add_argument("--output", type=Path, help="directory for the table, the figures and the picture")
    words = parser.parse_args(arguments)
    shapes = tuple(tuple(map(int, shape.split("x"))) for shape in words.shapes)
    options = ServingOptions(tuple(words.runtimes), shapes, num_threads=words.threads, num_rounds=words.rounds)
    names = [STOCK, *(f"static {count}/12" for count in words.converted), HALF]
    with tqdm(unit="turn", leave=False) as bar:

        def watch(doing: str, done: int, total: int) -> None:
            bar.set_description(doing)
            bar.total, bar.n = total, done
            bar.refresh()

        result = measure_serving({name: (build(name), None) for name in names}, options, watch=watch)
    about = environment(words.threads)
    checked = targets(result, options, names)
    lines = [", ".join(f"{key} {value}" for key, value in about.items()), "", result.markdown()]
    lines += ["| Aim | Bound | Measured | Met |", "| --- | ---: | ---: | --- |", *(target.row() for target in checked)]
    sys.stdout.write("\n".join(lines) + "\n")
    if words.output is not None:
        write_serving(result, about, words.output)
    return 0 if all(target.is_met for target in checked) else 1


if __name__ == "__main__":
    sys.exit(main())
