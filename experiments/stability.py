"""How far two plans of one selector agree, with other calibration rows and, for CAHP, with another seed of its plane.

    python -m experiments.stability out/demo/dense --dataset docstrings --heads 36 --samples 512

Prints the mean and the least Jaccard index of the kept heads over all pairs of draws.
"""

import argparse
import itertools
import statistics
from pathlib import Path

import torch
from transformers import PreTrainedModel

from shrp_hf import Budget
from shrp_hf.checkpoints import open_tokenizer
from shrp_hf.selectors import SELECTORS
from shrp_hf.tasks.fine_tuned import load_fine_tuned
from shrp_hf.tasks.loading import load_task
from shrp_hf.training.sampling import calibration_batches

Heads = frozenset[tuple[int, int]]


def agreement(plans: list[Heads]) -> str:
    """The mean and the least Jaccard index of all pairs, as cells of a table."""
    found = [len(one & other) / len(one | other) for one, other in itertools.combinations(plans, 2)]
    return f"{statistics.fmean(found):.2f} | {min(found):.2f}"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="hub id or directory of a fine-tuned model")
    parser.add_argument("--dataset", default="docstrings")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--heads", type=int, default=36)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--max-length", type=int, default=128)
    words = parser.parse_args()
    task = load_task(words.dataset, words.data_dir)
    model: PreTrainedModel = load_fine_tuned(words.model, task)
    tokenizer = open_tokenizer(words.model, model)
    rows = task.tokenize(tokenizer, max_length=words.max_length)["train"]

    def plan(name: str, draw: int, **options: int) -> Heads:
        batches = calibration_batches(rows, tokenizer, words.samples, batch_size=32, seed=draw)
        kept = SELECTORS[name](budget=Budget.heads(words.heads), **options).select(model, batches).kept
        return frozenset((layer, head) for layer, heads in enumerate(kept) for head in heads)

    chance = torch.Generator().manual_seed(0)
    total = model.config.num_hidden_layers * model.config.num_attention_heads
    lots = [frozenset((0, int(i)) for i in torch.randperm(total, generator=chance)[: words.heads]) for _ in range(100)]
    print(f"{words.heads} of {total} heads, {words.samples} rows, {words.draws} draws\n")
    print("| selector | what changes | mean | least |\n|---|---|---:|---:|")
    print(f"| cahp | the seed | {agreement([plan('cahp', 0, seed=seed) for seed in range(words.draws)])} |", flush=True)
    for name in ("cahp", "cahp-direct", "his"):
        print(f"| {name} | the rows | {agreement([plan(name, draw) for draw in range(words.draws)])} |", flush=True)
    print(f"| random heads | | {agreement(lots)} |")


if __name__ == "__main__":
    main()
