"""What the means of what is cut are worth: a fine-tuned model with fewer heads and neurons, not trained again.

    python -m experiments.means --dense DIR --dataset sst2 --data-dir DIR --output out/means.json

Heads by HIS and neurons by their importance, the same share of each (of neurons in every layer); scores are of the
reported rows, calibration is on training rows. With zeros what is cut puts out nothing, with
means its mean over the calibration rows.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from shrp_hf.families import head_layout
from shrp_hf.plans.budget import Budget
from shrp_hf.pruning import masked_heads
from shrp_hf.publishing.report import evaluate_on, write_text
from shrp_hf.scoring import StatsRequest, collect_head_stats
from shrp_hf.selectors import HisSelector
from shrp_hf.structures import uniform_plan
from shrp_hf.tasks.loading import load_task
from shrp_hf.tasks.task import Task
from shrp_hf.training.sampling import calibration_batches

SHARES = (0.9, 0.75, 0.5, 0.25)
KINDS = ("heads", "neurons", "both")


def measure(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, num_rows: int, seed: int
) -> list[dict[str, float | str]]:
    """Scores the model cut in every way, with zeros and with means; the first entry is the whole model."""
    data = task.tokenize(tokenizer)
    batches = calibration_batches(data["train"], tokenizer, num_rows, batch_size=32, seed=seed)
    request = StatsRequest(importance=True, neurons=True, means=True)
    stats, layout = collect_head_stats(model, batches, request), head_layout(model)

    def score() -> float:
        return evaluate_on(model, data["test"], task, tokenizer)[task.headline]

    found: list[dict[str, float | str]] = [{"kind": "whole", "keep": 1.0, "zeros": score(), "means": score()}]
    for keep in SHARES:
        heads = HisSelector(budget=Budget.fraction(keep)).select(model, stats=stats)
        neurons = uniform_plan(model, layout.num_heads, round(keep * max(layout.num_neurons)), stats)
        plans = {"heads": heads, "neurons": neurons, "both": heads.with_neurons(neurons.neurons, neurons.num_neurons)}
        for kind in KINDS:
            row: dict[str, float | str] = {"kind": kind, "keep": keep}
            for name, means in (("zeros", None), ("means", stats.output_means())):
                with masked_heads(model, plans[kind], means):
                    row[name] = score()
            found.append(row)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark and prints a table."""
    parser = argparse.ArgumentParser(
        "python -m experiments.means", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dense", required=True, help="directory of the fine-tuned model, with its tokenizer")
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--calibration-samples", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="also write the figures to this JSON file")
    options = parser.parse_args(arguments)
    set_seed(options.seed)
    model = AutoModelForSequenceClassification.from_pretrained(options.dense).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.dense)
    task = load_task(options.dataset, options.data_dir, seed=options.seed)
    rows = measure(model, tokenizer, task, options.calibration_samples, options.seed)
    lines = ["| cut | keep | with zeros | with means |", "|---|---:|---:|---:|"]
    lines += [f"| {row['kind']} | {row['keep']} | {row['zeros']:.4f} | {row['means']:.4f} |" for row in rows]
    sys.stdout.write("\n".join(lines) + "\n")
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        write_text(options.output, json.dumps({"rows": rows, "options": vars(options)}, indent=2, default=str) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
