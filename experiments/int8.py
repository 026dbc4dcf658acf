"""What int8 costs on a task: each model in PyTorch and as an int8 file in ONNX Runtime, on the reported rows."""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from shrp_hf.export import export_onnx, onnx_session
from shrp_hf.export.check import onnx_outputs
from shrp_hf.measuring import accuracy_interval
from shrp_hf.measuring.workloads import Workload, by_length
from shrp_hf.publishing.report import predict_on, write_text
from shrp_hf.tasks.loading import load_task
from shrp_hf.tasks.task import Task

EXAMPLE = """example:
  python -m experiments.int8 out/sst2/dense out/half --dataset sst2 --data-dir DIR --output out/int8.json

Models are directories of classifiers with their tokenizers; each is exported anew. int8 activations are scaled by batch, so
a sentence's logits depend a little on what shares its batch (32, sorted by length)."""


def decisions(folder: str, task: Task, work: Path) -> dict[str, np.ndarray]:
    """Returns the classes of the reported rows by "PyTorch" and by "int8", and the labels."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    expected = predict_on(model, task.tokenize(tokenizer)["test"], tokenizer)
    session = onnx_session(export_onnx(model, tokenizer, work, int8=True, min_agreement=0.0))
    texts = list(task.test["text"])
    batches = Workload(32, 128, tuple(texts)).batches(model, tokenizer)
    arrays = [{name: value.numpy() for name, value in batch.items()} for batch in batches]
    logits = np.concatenate([onnx_outputs(session, ["logits"], batch)["logits"] for batch in arrays])
    found = np.empty(len(texts), dtype=int)
    found[by_length(tokenizer(texts, truncation=True, max_length=128)["input_ids"])] = logits.argmax(-1)
    return {"PyTorch": expected.predictions.argmax(-1), "int8": found, "labels": expected.label_ids}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the measurement; returns the exit code."""
    parser = argparse.ArgumentParser(
        "python -m experiments.int8", description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", help="directories of classifiers")
    parser.add_argument("--dataset", required=True, help="a classification task of single sentences")
    parser.add_argument("--data-dir", type=Path, help="directory with the task's files")
    parser.add_argument("--output", type=Path, help="also write the figures to this JSON file")
    words = parser.parse_args(arguments)
    task = load_task(words.dataset, words.data_dir)
    figures = []
    lines = [
        "| Model | PyTorch float32 (95% interval) | int8 (95% interval) | equal classes |",
        "| --- | ---: | ---: | ---: |",
    ]
    for folder in words.models:
        with tempfile.TemporaryDirectory() as work:
            found = decisions(folder, task, Path(work))
        total, cells = len(found["labels"]), []
        row = {"model": folder, "rows": total, "agreement": float((found["PyTorch"] == found["int8"]).mean())}
        for name in ("PyTorch", "int8"):
            correct = int((found[name] == found["labels"]).sum())
            row[name] = correct / total
            cells.append("{:.4f} ({:.3f} to {:.3f})".format(row[name], *accuracy_interval(correct, total)))
        figures.append(row)
        lines.append(f"| {folder} | {' | '.join(cells)} | {row['agreement']:.2%} |")
    sys.stdout.write("\n".join(lines) + "\n")
    if words.output is not None:
        write_text(words.output, json.dumps(figures, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
