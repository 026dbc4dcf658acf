"""Prunes half the heads of a fine-tuned classifier by HIES, and shows that cutting equals masking.

python examples/prune_posthoc.py --model out/demo/dense --dataset docstrings --output out/half
"""

import argparse

import torch
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding

from shrp_hf import Budget, HiesSelector, masked_heads, prune_heads
from shrp_hf.checkpoints import open_tokenizer
from shrp_hf.tasks import load_fine_tuned, load_task


def main() -> None:
    """Scores, chooses, cuts, compares and saves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory or Hub id of a fine-tuned classifier")
    parser.add_argument("--dataset", default="docstrings", help="task name, directory or Hub data set")
    parser.add_argument("--data-dir", help="directory with the task's files")
    parser.add_argument("--keep", type=float, default=0.5, help="share of the heads that stay")
    parser.add_argument("--output", required=True, help="directory for the smaller model")
    args = parser.parse_args()

    task = load_task(args.dataset, args.data_dir, max_train=512)
    model = load_fine_tuned(args.model, task)  # refuses, by name, what was not fine-tuned on it
    tokenizer = open_tokenizer(args.model, model)
    rows = task.tokenize(tokenizer)["train"]
    batches = DataLoader(rows, batch_size=32, collate_fn=DataCollatorWithPadding(tokenizer))

    plan = HiesSelector(budget=Budget.fraction(args.keep)).select(model, batches)
    pruned = prune_heads(model, plan)

    inputs = tokenizer(task.test["text"][:8], padding=True, truncation=True, return_tensors="pt")
    with torch.inference_mode():
        cut = pruned(**inputs).logits
        with masked_heads(model, plan):
            masked = model(**inputs).logits
    print(f"{plan.num_kept} heads stay; cut and masked differ by at most {(cut - masked).abs().max():.1e}")
    pruned.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)


if __name__ == "__main__":
    main()
