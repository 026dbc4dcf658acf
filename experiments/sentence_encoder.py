"""A real sentence encoder, halved without training and converted to experts: size and Spearman on STS-B.

    python -m experiments.sentence_encoder --model DIR --data-dir DIR --output out/encoder

1. Half of the heads (HIS) and half of the FFN neurons (importance), scored on pairs of the training rows; what is cut leaves
   its mean in the biases. Nothing is trained.
2. The last layers become routed expert layers, are trained for a few steps towards the embeddings of the whole model, and
   keep their most used expert: far too few steps for quality; it shows that the way is open.

Both are saved in the place of the encoder, opened by SentenceTransformer in a process that has no shrp_hf, and judged there.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from scipy.stats import spearmanr
from sentence_transformers import SentenceTransformer
from torch import nn
from torch.nn import functional
from transformers import AutoModel, AutoTokenizer, PreTrainedModel

from shrp_hf import Budget, HisSelector, ShrpTrainer, ShrpTrainingArguments, prune_heads, to_shrp
from shrp_hf.measuring import count_flops, count_parameters
from shrp_hf.publishing.report import write_text
from shrp_hf.scoring import StatsRequest, collect_head_stats
from shrp_hf.tasks import load_task

SHAPE = (32, 32)  # sequences, tokens: a batch of sentences
OPEN = """
import sys
sys.modules["shrp_hf"] = None  # as where it is not installed
import json, torch
from sentence_transformers import SentenceTransformer
torch.set_num_threads(int(sys.argv[3]))
encoder = SentenceTransformer(sys.argv[1], device="cpu", trust_remote_code=True)
torch.save(encoder.encode(json.load(open(sys.argv[2])), normalize_embeddings=True, convert_to_tensor=True), sys.argv[4])
"""


def pooled(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The mean over the real tokens of states (batch, length, hidden), of length 1."""
    mask = mask.unsqueeze(-1).to(states)
    return functional.normalize((states * mask).sum(dim=1) / mask.sum(dim=1), dim=-1)


def pair_model(model: PreTrainedModel) -> PreTrainedModel:
    """The same encoder, whose loss is the squared error of the cosine of rows 2i and 2i + 1 with their label."""

    class Pairs(type(model)):
        def forward(self, labels: torch.Tensor | None = None, **inputs: Any) -> Any:
            output = super().forward(**inputs)
            vectors = pooled(output.last_hidden_state, inputs["attention_mask"])
            cosine = (vectors[::2] * vectors[1::2]).sum(dim=-1)
            output["loss"] = None if labels is None else functional.mse_loss(cosine, labels[::2])
            return output

    pairs = Pairs(model.config, add_pooling_layer=False)
    pairs.load_state_dict(model.state_dict())
    return pairs.eval()


def pair_batches(rows: Dataset, tokenizer: Any, count: int, batch_size: int) -> list[dict[str, torch.Tensor]]:
    """Batches of `count` pairs, the two sentences of each one after the other, with their score from 0 to 1."""
    batches = []
    for start in range(0, count, batch_size):
        part = rows[start : start + batch_size]
        texts = [text for pair in zip(part["text"], part["text_pair"], strict=True) for text in pair]
        scores = torch.tensor(part["label"]).repeat_interleave(2) / 5
        encoded = tokenizer(texts, padding=True, truncation=True, max_length=48, return_tensors="pt")
        batches.append({**encoded, "labels": scores})
    return batches


def halved(model: PreTrainedModel, batches: list[dict[str, torch.Tensor]]) -> PreTrainedModel:
    """Half of the heads and of the neurons, without training."""
    request = StatsRequest(importance=True, neurons=True, means=True)
    stats = collect_head_stats(pair_model(model), batches, request)
    plan = HisSelector(budget=Budget.fraction(0.5), neurons=True).select(model, stats=stats)
    return prune_heads(model, plan, stats.output_means())


class EmbeddingTrainer(ShrpTrainer):
    """Draws the embedding of a sentence towards its label, the embedding of the whole model."""

    def compute_loss(self, model: nn.Module, inputs: dict, *args: object, **kwargs: object) -> object:
        """One minus the cosine, and what ShrpTrainer adds."""
        mask = inputs["attention_mask"]

        def loss(outputs: dict, labels: torch.Tensor, **_: object) -> torch.Tensor:
            return 1 - functional.cosine_similarity(pooled(outputs["last_hidden_state"], mask), labels).mean()

        self.compute_loss_func = loss
        return super().compute_loss(model, inputs, *args, **kwargs)


def experts(
    model: PreTrainedModel, encoder: SentenceTransformer, texts: list[str], args: argparse.Namespace
) -> PreTrainedModel:
    """The last layers as expert layers, trained for a few steps; one expert of each is left."""
    goals = encoder.encode(texts, normalize_embeddings=True)
    rows = Dataset.from_dict({**encoder.tokenizer(texts, truncation=True, max_length=48), "labels": goals.tolist()})
    steps = {"balance_steps_per_layer": args.steps, "specialise_steps": args.steps, "num_expert_layers": args.expert_layers}
    options = {
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": args.steps,
        "label_names": ["labels"],
    }
    options |= {"per_device_train_batch_size": 8, "learning_rate": 1e-4, "expander_learning_rate": 2e-3}
    options |= {"distillation_logits": 0.0, "hidden_dropout": 0.0, "attention_dropout": 0.0}
    arguments = ShrpTrainingArguments(f"{args.output}/runs", **options, **steps)
    trainer = EmbeddingTrainer(model, arguments, train_dataset=rows, processing_class=encoder.tokenizer)
    trainer.train()
    routed = trainer.accelerator.unwrap_model(trainer.model)
    routed.prune_heads(trainer.usage_plan())
    return routed.eval()


def judged(folder: Path, rows: Dataset) -> float:
    """Spearman of the cosines with the labels, by a process that has no shrp_hf."""
    with tempfile.TemporaryDirectory() as scratch:
        texts, found = Path(scratch, "texts.json"), Path(scratch, "found.pt")
        texts.write_text(json.dumps([*rows["text"], *rows["text_pair"]]), encoding="utf-8")
        command = [sys.executable, "-c", OPEN, str(folder), str(texts), str(torch.get_num_threads()), str(found)]
        subprocess.run(command, check=True)
        first, second = torch.load(found, weights_only=True).chunk(2)
    return float(spearmanr((first * second).sum(dim=1), rows["label"]).statistic)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark and prints a table."""
    parser = argparse.ArgumentParser(
        "python -m experiments.sentence_encoder", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="directory of a SentenceTransformer that takes the mean of its states")
    parser.add_argument("--data-dir", required=True, help="directory with STS-B's train.tsv and dev.tsv")
    parser.add_argument("--output", required=True, help="directory for the smaller encoders and `table.md`")
    parser.add_argument("--pairs", type=int, default=256, help="training pairs on which heads and neurons are scored")
    parser.add_argument("--rows", type=int, help="most reported rows; default all")
    parser.add_argument("--expert-layers", type=int, default=6, help="layers to convert, counted from the last")
    parser.add_argument("--steps", type=int, default=4, help="training steps for each layer, and for the experts")
    args = parser.parse_args(arguments)

    task, output = load_task("stsb", args.data_dir), Path(args.output)
    rows = task.test.select(range(min(args.rows or len(task.test), len(task.test))))
    encoder, tokenizer = SentenceTransformer(args.model, device="cpu"), AutoTokenizer.from_pretrained(args.model)
    train = task.train

    def dense() -> PreTrainedModel:
        return AutoModel.from_pretrained(args.model, add_pooling_layer=False).eval()

    models = {"whole": dense(), "half of heads and neurons": halved(dense(), pair_batches(train, tokenizer, args.pairs, 16))}
    texts = list(train["text"])[: 16 * args.steps * (args.expert_layers + 1)]
    models[f"{args.expert_layers} expert layers, {args.steps} steps each"] = experts(to_shrp(dense()), encoder, texts, args)
    lines = ["| | Spearman on STS-B | parameters | MB | FLOPs |", "|---|---:|---:|---:|---:|"]
    for number, (name, model) in enumerate(models.items()):
        folder = output / str(number)
        encoder.save(str(folder))
        if number:
            model.save_pretrained(folder)  # in the place of the whole encoder
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e6
        share = count_flops(model, *SHAPE) / count_flops(models["whole"], *SHAPE)
        lines.append(f"| {name} | {judged(folder, rows):.4f} | {count_parameters(model).whole:,} | {size:.0f} | {share:.1%} |")
    text = "\n".join(lines) + "\n"
    write_text(output / "table.md", text)
    sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
