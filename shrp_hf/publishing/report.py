"""Models side by side: quality on the reported split, parameters, FLOPs, measured speed."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase

from shrp_hf.defaults import SERVED_SHAPE
from shrp_hf.files import written_whole
from shrp_hf.measuring import ModelReport, Timing, count_flops, count_parameters, measure_throughput, report_table
from shrp_hf.models.lengths import num_positions
from shrp_hf.models.outputs import JUDGED, answers_of, predicts_per_token
from shrp_hf.tasks.baseline import baseline_of
from shrp_hf.tasks.task import Task, shown
from shrp_hf.training.sampling import RowCollator


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all: to a temporary name, then moved."""
    with written_whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def predict_on(
    model: PreTrainedModel, rows: Dataset, tokenizer: PreTrainedTokenizerBase, batch_size: int = 64
) -> EvalPrediction:
    """Returns what a model says of tokenised rows, in their order, and what judges it.

    The model goes to a GPU if there is one. Rows of like length share a batch, so little is spent on padding.

    Args:
        model: The model.
        rows: From `Task.tokenize`.
        tokenizer: Pads the batches.
        batch_size: Rows of a batch.

    Returns:
        Logits (rows, labels), or vectors (rows, width); of a token classifier a list with the logits (tokens, labels) of each
        row. Beside them the column `judged` where there is one, else the labels, an array.
    """
    model = model.to("cuda" if torch.cuda.is_available() else model.device)
    lengths = [len(ids) for ids in rows["input_ids"]]
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    batches = DataLoader(rows.select(order), batch_size, collate_fn=RowCollator(tokenizer))
    was_training = model.training
    model.eval()
    found: list[np.ndarray] = []
    with torch.inference_mode():
        for batch in batches:
            inputs = {name: value.to(model.device) for name, value in batch.items() if name != "labels"}
            said = answers_of(model, model(**inputs), inputs.get("attention_mask"))
            found += [answer.numpy() for answer in said]
    model.train(was_training)
    answers = [found[place] for place in np.argsort(order)]
    judged = rows[JUDGED][:] if JUDGED in rows.column_names else np.asarray(rows["label"])
    return EvalPrediction(answers if predicts_per_token(model) else np.stack(answers), judged)


def evaluate_on(
    model: PreTrainedModel, rows: Dataset, task: Task, tokenizer: PreTrainedTokenizerBase, batch_size: int = 64
) -> dict[str, float]:
    """Returns the task's metrics of `model` on tokenised rows."""
    return task.compute_metrics(predict_on(model, rows, tokenizer, batch_size))


def measure_models(
    models: Mapping[str, PreTrainedModel],
    scores: Mapping[str, Mapping[str, float]],
    task: Task,
    num_rounds: int = 5,
    timings: Mapping[str, Timing] | None = None,
) -> list[ModelReport]:
    """Measures parameters, FLOPs and throughput of several models in one run.

    Args:
        models: Name -> model; ratios are against the first. They end on the CPU, in evaluation mode.
        scores: Name -> metrics on the reported split.
        task: The task.
        num_rounds: Rounds of the throughput measurement.
        timings: Name -> timing, where they were measured in one run already; FLOPs are counted at their shape.
    """
    batch_size, length = SERVED_SHAPE
    length = min([length, *filter(None, map(num_positions, models.values()))])
    models = {name: model.to("cpu").eval() for name, model in models.items()}
    if timings is None:
        timings = measure_throughput(models, batch_size, length, num_rounds=num_rounds)
    else:
        batch_size, length = (getattr(next(iter(timings.values())), name) for name in ("batch_size", "length"))
    total = len(task.test)
    return [
        ModelReport(
            name=name,
            parameters=count_parameters(model),
            flops=count_flops(model, batch_size, length),
            timing=timings[name],
            correct=(round(scores[name]["accuracy"] * total), total) if "accuracy" in scores[name] else None,
        )
        for name, model in models.items()
    ]


def compare_models(rows: Sequence[ModelReport], scores: Mapping[str, Mapping[str, float]], task: Task) -> str:
    """Returns Markdown: a table of the models and what reads nothing, how they were measured, and all metrics.

    Args:
        rows: From `measure_models`; ratios are against the first.
        scores: Name -> metrics on the reported split.
        task: The task.
    """
    metrics = "\n".join(
        f"- {row.name}: " + ", ".join(f"{metric} {shown(value)}" for metric, value in scores[row.name].items()) for row in rows
    )
    blind, total = baseline_of(task, task.test), len(task.test)
    metrics += f"\n- {blind.name}: {blind.text()}"
    correct = (round(blind.metrics["accuracy"] * total), total) if "accuracy" in blind.metrics else None
    timing = rows[0].timing
    where = f"{timing.num_threads} CPU threads" if timing.device == "cpu" else timing.device
    count = f"{len(task.test)} rows" if task.num_reported == total else f"{task.num_reported} {task.kind.unit(task.test)}"
    return f"""{report_table(rows, (blind.name, correct))}

FLOPs and throughput: batch {timing.batch_size} x {timing.length} tokens, {where}, one run, median
over {len(timing.seconds)} rounds. Parameters in three conventions: a reduction of "encoder + pooler" is not one of the whole
model, whose embeddings stay.

Reported on {count} ({task.reported}), which chose nothing:

{metrics}
"""
