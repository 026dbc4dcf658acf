"""ONNX Runtime against stock BERT-base in PyTorch eager: float32 and int8, with random weights, on the CPU."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import BertConfig, BertModel, PreTrainedModel

from benchmarks.foundation import BUSY_SPREAD, Target, environment, shown, static
from shrp_hf.benchmark import Timing, measure_throughput
from shrp_hf.models.modeling_shrp_bert import ShrpBertModel
from shrp_hf.onnx_export import export_onnx, onnx_session

EXAMPLE = """example:
  python -m benchmarks.onnx --threads 2 --exports out/onnx-benchmark --output out/onnx.json

The exit code is 1 when an aim is missed. Files that `--exports` holds already are not written again. Let the machine do
nothing else meanwhile."""
CONVERTED = (3, 6, 9, 11, 12)
PRECISIONS = ("float32", "int8")
AIMS = {"8x128": 18.0, "1x32": 12.0}  # static 11/12 in int8 against stock float32 in PyTorch eager
STOCK = "stock"


class OnnxModel(nn.Module):
    """An ONNX file that is called as a model is, without padding.

    Args:
        path: The file.
        config: The config of its model.
        num_threads: Threads within an operator.
    """

    def __init__(self, path: Path, config: BertConfig, num_threads: int) -> None:
        super().__init__()
        self.config = config
        self.device_of_inputs = nn.Parameter(torch.zeros(()))
        self.session = onnx_session(path, num_threads)
        self.names = [node.name for node in self.session.get_inputs()]

    def forward(self, input_ids: torch.Tensor) -> list:
        """Returns the outputs as arrays."""
        made = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "token_type_ids": input_ids * 0}
        return self.session.run(None, {name: made[name].numpy() for name in self.names})


def build(converted: int) -> PreTrainedModel:
    """The base model whose last `converted` layers keep one expert each; 0 is stock BERT."""
    torch.manual_seed(0)
    return (ShrpBertModel(static(converted)) if converted else BertModel(BertConfig())).eval()


def build_all(converted: Sequence[int], exports: Path, num_threads: int) -> dict[str, nn.Module]:
    """Builds every model, exports it in both precisions where that is not done, and opens the files."""
    models: dict[str, nn.Module] = {}
    for count in (0, *converted):
        name, model = f"static {count}/12" if count else STOCK, build(count)
        models[f"{name}, PyTorch"] = model
        for precision in PRECISIONS:
            folder = exports / f"{count}-{precision}"
            if not (folder / "model.onnx").exists():
                export_onnx(model, None, folder, int8=precision == "int8", min_agreement=0.0)
            models[f"{name}, ONNX {precision}"] = OnnxModel(folder, model.config, num_threads)
    return models


def targets(shape: str, timings: dict[str, Timing], converted: Sequence[int]) -> list[Target]:
    """What was promised for this shape."""
    stock = timings[f"{STOCK}, PyTorch"]
    found = []
    if shape in AIMS and 11 in converted:
        ratio = timings["static 11/12, ONNX int8"].ratio_to(stock)
        found.append(Target(f"static 11/12, ONNX int8 against stock, {shape}", ratio, AIMS[shape], True))
    for count in converted:
        for precision in PRECISIONS:
            name = f"static {count}/12"
            ratio = timings[f"{name}, ONNX {precision}"].ratio_to(timings[f"{name}, PyTorch"])
            found.append(Target(f"{name}, ONNX {precision} against the same in PyTorch, {shape}", ratio, 1.0, True))
    return found


def table(runs: dict[str, dict[str, Timing]]) -> list[str]:
    """A Markdown table: a row a model, a column a shape; ratios against stock in PyTorch."""
    lines = ["| Model | " + " | ".join(runs) + " |", "| --- |" + " ---: |" * len(runs)]
    for name in next(iter(runs.values())):
        stock = f"{STOCK}, PyTorch"
        cells = [f"{t[name].ratio_to(t[stock]):.2f}x ({1e3 * t[name].p50:.1f} ms)" for t in runs.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit code."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.onnx",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=5, help="rounds in which the models take turns (default: 5)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (default: torch's)")
    parser.add_argument("--shapes", nargs="+", default=["8x128", "32x128", "1x32"], help="batch x length")
    parser.add_argument("--converted", nargs="+", type=int, default=list(CONVERTED), help="layers converted, of 12")
    parser.add_argument("--exports", type=Path, default=Path("out/onnx-benchmark"), help="directory for the ONNX files")
    parser.add_argument("--output", type=Path, help="also write the figures to this JSON file")
    options = parser.parse_args(arguments)
    models = build_all(options.converted, options.exports, options.threads)
    runs = {}
    for shape in options.shapes:
        batch_size, length = map(int, shape.split("x"))
        counts = {"num_rounds": options.rounds, "num_threads": options.threads}
        runs[shape] = shown(measure_throughput, shape, models, batch_size, length, **counts)
    about = environment(options.threads)
    checked = [target for shape, run in runs.items() for target in targets(shape, run, options.converted)]
    lines = [", ".join(f"{key} {value}" for key, value in about.items()), "", *table(runs), ""]
    lines += ["| Aim | Bound | Measured | Met |", "| --- | ---: | ---: | --- |", *(target.row() for target in checked)]
    spread = max(timing.spread for run in runs.values() for timing in run.values())
    lines += ["", f"Largest spread (quartiles over median): {spread:.0%}." + (" **Run it again.**" * (spread > BUSY_SPREAD))]
    sys.stdout.write("\n".join(lines) + "\n")
    if options.output is not None:
        figures = {"environment": about, "timings": {s: [t.summary() for t in run.values()] for s, run in runs.items()}}
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0 if all(target.is_met for target in checked) else 1


if __name__ == "__main__":
    sys.exit(main())
