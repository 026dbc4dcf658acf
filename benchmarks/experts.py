"""Whether routing chooses the expert that a layer needs: SHRP without a router, its experts chosen beforehand.

    python -m benchmarks.experts --dense DIR --dataset stsb --data-dir DIR --choices his,random --seed 2 --output out/experts

All layers but the first are converted at once, with one expert each or more: the heads of the highest importance in the
dense model (HIS), or some drawn by the seed. The static model then trains on as many examples as SHRP with its routers
does, at the same rates and taught alike: as long as the two stages, then the recovery. Every choice is a file, so a run
that was interrupted goes on.
"""

import argparse
import json
import random
from dataclasses import replace
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    set_seed,
)

from benchmarks.tries import static_model
from shrp_hf.head_stats import StatsRequest, collect_head_stats
from shrp_hf.recipes import RECIPES, Setup, recover
from shrp_hf.report import evaluate_on, write_text
from shrp_hf.tasks.loading import load_task

CHOICES = ("his", "random")
CALIBRATION_ROWS = 1024


def choose(choice: str, dense: PreTrainedModel, setup: Setup, count: int) -> list[list[int]]:
    """`count` heads of every layer."""
    config, train = dense.config, setup.data["train"]
    if not 1 <= count <= config.num_attention_heads:
        raise ValueError(f"`experts` must be between 1 and {config.num_attention_heads}, got {count}.")
    if choice == "random":
        draw = random.Random(setup.seed)
        return [draw.sample(range(config.num_attention_heads), count) for _ in range(config.num_hidden_layers)]
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(setup.seed))
    rows = train.select(order[:CALIBRATION_ROWS].tolist())
    batches = DataLoader(rows, setup.batch_size, collate_fn=DataCollatorWithPadding(setup.tokenizer))
    importance = collect_head_stats(dense, batches, StatsRequest(importance=True)).importance()
    return importance.topk(count, dim=1).indices.tolist()


def main() -> None:
    """Trains every choice that has no file yet, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dense", required=True, help="directory of a fine-tuned dense BERT")
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--choices", default="his,random", help="his, random")
    parser.add_argument("--experts", type=int, default=1, help="experts of a layer")
    parser.add_argument("--examples-per-epoch", type=int, help="default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    if unknown := set(args.choices.split(",")) - set(CHOICES):
        parser.error(f"--choices must be of {', '.join(CHOICES)}, got {', '.join(sorted(unknown))}")
    task = load_task(args.dataset, args.data_dir)
    tokenizer = AutoTokenizer.from_pretrained(args.dense)
    data = task.tokenize(tokenizer)
    setup = Setup(
        data,
        tokenizer,
        args.output / "checkpoints",
        seed=args.seed,
        examples_per_epoch=args.examples_per_epoch,
        bf16=args.bf16,
        resumable=False,
    )
    args.output.mkdir(parents=True, exist_ok=True)
    print(f"| experts by | experts | {task.headline}, {task.reported} | held out |\n|---|---|---:|---:|")
    for choice in args.choices.split(","):
        name = f"{choice}{args.experts}-seed{args.seed}"
        path = args.output / f"{name}.json"
        if not path.exists():
            set_seed(args.seed)
            dense, copy = (AutoModelForSequenceClassification.from_pretrained(args.dense).eval() for _ in range(2))
            experts = choose(choice, dense, setup, args.experts)
            recipe = RECIPES["default"]
            epochs = recipe.balance_epochs_per_layer * (len(experts) - 1) + recipe.specialise_epochs
            stages = replace(recipe, recovery_epochs=epochs, recovery_learning_rate=recipe.learning_rate)
            model = static_model(copy, {layer: heads for layer, heads in enumerate(experts) if layer})
            model = recover(model, dense, setup, stages, name=f"{name}-stages")
            model = recover(model, dense, setup, recipe, name=f"{name}-recovery")
            scores = {split: evaluate_on(model, data[split], task, tokenizer) for split in ("test", "validation")}
            write_text(path, json.dumps({"choice": choice, "seed": args.seed, "experts": experts, **scores}, indent=1) + "\n")
        found = json.loads(path.read_text(encoding="utf-8"))
        test, held_out = (found[split][task.headline] for split in ("test", "validation"))
        print(f"| {choice} | {found['experts'][1:]} | {test:.4f} | {held_out:.4f} |", flush=True)


if __name__ == "__main__":
    main()
