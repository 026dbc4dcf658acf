"""What pays in SHRP's training: one change at a time, on held-out rows.

    python -m benchmarks.tries --dense DIR --dataset sst2 --data-dir DIR --examples 19200 --seeds 0,1,2 --output out/tries

All layers but one are converted at once, one expert drawn by the seed stays in each, and the static model is trained from
there: what is left of a conversion when the routing is taken out, and cheap enough to try many things. Every try is a file,
so a run that was interrupted goes on.
"""

import argparse
import json
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from shrp_hf.plan import KeepPlan
from shrp_hf.recipes import Setup, fine_tune
from shrp_hf.report import evaluate_on, write_text
from shrp_hf.surgery import prune_heads, to_shrp
from shrp_hf.tasks.loading import load_task
from shrp_hf.tasks.task import Task

BASE = {
    "learning_rate": 3e-4,
    "expander_learning_rate": 2e-3,
    "distillation_logits": 1.0,
    "distillation_hidden_states": 1.0,
}
# name: (layer that stays, changed arguments, start, whether the dense model teaches)
TRIES: dict[str, tuple[int, dict, str, bool]] = {
    "as it is": (0, {}, "heads", True),
    "no teacher": (0, {}, "heads", False),
    "teacher's logits alone": (0, {"distillation_hidden_states": 0.0}, "heads", True),
    "hidden states weigh 5": (0, {"distillation_hidden_states": 5.0}, "heads", True),
    "value relations as well": (0, {"distillation_value_relations": 1.0}, "heads", True),
    "one learning rate of 3e-4": (0, {"expander_learning_rate": None}, "heads", True),
    "one learning rate of 1e-3": (0, {"learning_rate": 1e-3, "expander_learning_rate": None}, "heads", True),
    "experts at 1e-4": (0, {"learning_rate": 1e-4}, "heads", True),
    "expanders by least squares": (0, {}, "least squares", True),
    "layer 2 stays": (2, {}, "heads", True),
    "the last layer stays": (-1, {}, "heads", True),
    "no dropout": (0, {}, "no dropout", True),
}


def static_model(dense: PreTrainedModel, experts: Mapping[int, Sequence[int]]) -> PreTrainedModel:
    """Converts the layers that `experts` names, each of which keeps its own; the other layers stay as they are."""
    model = to_shrp(dense)
    num_heads = model.config.num_attention_heads
    model.convert_layers_(sorted(experts))
    kept = [sorted(experts.get(i, range(num_heads))) for i in range(model.config.num_hidden_layers)]
    return prune_heads(model, KeepPlan(tuple(map(tuple, kept)), num_heads))


def drawn_experts(dense: PreTrainedModel, stays: int, seed: int) -> dict[int, list[int]]:
    """One expert of every layer but `stays`."""
    config, draw = dense.config, random.Random(seed)
    layers = [i for i in range(config.num_hidden_layers) if i != stays % config.num_hidden_layers]
    return {layer: [draw.randrange(config.num_attention_heads)] for layer in layers}


@torch.no_grad()
def fit_expanders_(model: PreTrainedModel, dense: PreTrainedModel, batches: DataLoader) -> None:
    """Sets every expander to the least-squares fit of what its layer adds in the dense model.

    The weight is fitted from the expert's output to that difference, and shifted by three deviations to where GELU is
    nearly linear; then gain and bias of the LayerNorm are fitted, one width at a time.
    """
    layers = model.config.expert_layers
    seen: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {layer: [] for layer in layers}
    for batch in batches:
        mask = batch["attention_mask"].bool()
        hidden = dense(**{k: v for k, v in batch.items() if k != "labels"}, output_hidden_states=True).hidden_states
        for layer in layers:
            heads, _ = model.layers[layer].attention.self(hidden[layer], mask[:, None, None, :])
            seen[layer].append((heads.squeeze(2)[mask], (hidden[layer + 1] - hidden[layer])[mask]))
    for layer in layers:
        head, wanted = (torch.cat(parts).double() for parts in zip(*seen[layer], strict=True))
        inputs = torch.cat([head, torch.ones(len(head), 1, dtype=head.dtype)], dim=1)
        fit = torch.linalg.lstsq(inputs, wanted).solution
        scale = 1 / (inputs @ fit).std()
        expander = model.layers[layer].expander
        expander.dense.weight.copy_(scale * fit[:-1].T)
        expander.dense.bias.copy_(scale * fit[-1] + 3.0)
        expander.LayerNorm.weight.fill_(1.0)
        expander.LayerNorm.bias.zero_()
        found = expander(head.float()).double()
        centred = found - found.mean(dim=0)
        gain = (centred * (wanted - wanted.mean(dim=0))).sum(dim=0) / centred.square().sum(dim=0).clamp(min=1e-9)
        expander.LayerNorm.weight.copy_(gain)
        expander.LayerNorm.bias.copy_(wanted.mean(dim=0) - gain * found.mean(dim=0))


def stop_dropout_(model: PreTrainedModel) -> None:
    """Trains the model without dropout; its config keeps what it says."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):  # of attention weights
            module.dropout = 0.0


def run_try(
    name: str, seed: int, load: Callable[[], PreTrainedModel], setup: Setup, task: Task, tokenizer: PreTrainedTokenizerBase
) -> dict:
    """Trains one try; returns its quality on the held-out rows."""
    stays, changes, start, is_taught = TRIES[name]
    set_seed(seed)
    dense = load()
    model = static_model(load(), drawn_experts(dense, stays, seed))
    if start == "no dropout":
        stop_dropout_(model)
    elif start == "least squares":
        rows = setup.data["train"].shuffle(seed=seed).select(range(min(768, len(setup.data["train"]))))
        fit_expanders_(model, dense, DataLoader(rows, 32, collate_fn=DataCollatorWithPadding(tokenizer)))
    options = BASE | changes
    model = fine_tune(
        model, setup, 1.0, options.pop("learning_rate"), name="try", teacher=dense if is_taught else None, **options
    )
    return {"try": name, "seed": seed, "held_out": evaluate_on(model, setup.data["validation"], task, tokenizer)}


def main() -> None:
    """Runs every try that has no file yet, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dense", required=True, help="directory of a fine-tuned dense BERT")
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--examples", type=int, default=19200, help="training examples of a try")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--tries", default=",".join(TRIES), help="names, separated by commas")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    task = load_task(args.dataset, args.data_dir)
    tokenizer = AutoTokenizer.from_pretrained(args.dense)
    data = task.tokenize(tokenizer)
    args.output.mkdir(parents=True, exist_ok=True)
    found: dict[str, list[float]] = {}
    for seed in map(int, args.seeds.split(",")):
        for number, name in enumerate(TRIES):
            if name not in args.tries.split(","):
                continue
            path = args.output / f"try{number}-seed{seed}.json"
            if not path.exists():
                setup = Setup(
                    data,
                    tokenizer,
                    args.output / "checkpoints",
                    seed=seed,
                    examples_per_epoch=args.examples,
                    bf16=args.bf16,
                    resumable=False,
                )
                result = run_try(
                    name, seed, lambda: AutoModelForSequenceClassification.from_pretrained(args.dense), setup, task, tokenizer
                )
                write_text(path, json.dumps(result | {"examples": args.examples}, indent=1) + "\n")
            result = json.loads(path.read_text(encoding="utf-8"))
            found.setdefault(name, []).append(result["held_out"][task.headline])
    print(
        f"| {args.examples} examples, {task.headline} on {len(task.validation)} held-out rows | mean | seeds |\n|---|---:|---|"
    )
    for name, values in found.items():
        print(f"| {name} | {statistics.fmean(values):.4f} | {', '.join(f'{value:.4f}' for value in values)} |")


if __name__ == "__main__":
    main()
