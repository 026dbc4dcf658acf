"""The rows of a task that an exported file is compared, judged and calibrated on."""

from collections.abc import Sequence

import numpy as np
from datasets import Dataset
from transformers import EvalPrediction

from shrp_hf.export.options import ExportOptions, ExportRows, QualityLoss, Text
from shrp_hf.tasks.task import Task


def rows_of_task(task: Task, options: ExportOptions, calibration: Sequence[Text] | None = None) -> ExportRows:
    """Takes the held-out rows, never the reported ones; static int8 finds its scales on training rows.

    Args:
        task: The task, as small as the comparison may take.
        options: What is written.
        calibration: Texts to find the scales on instead.
    """
    if options.precision == "int8-static" and calibration is None:
        calibration = _texts(task.train)
    labels = np.asarray(task.validation["label"])

    def judge(model: np.ndarray, file: np.ndarray) -> QualityLoss:
        return quality_loss(task, EvalPrediction(model, labels), EvalPrediction(file, labels))

    return ExportRows(_texts(task.validation), judge, calibration)


def quality_loss(task: Task, model: EvalPrediction, file: EvalPrediction) -> QualityLoss:
    """Judges a file beside its model: the headline metric of both, and a 95% interval of the loss (paired bootstrap).

    Args:
        task: The task.
        model: Logits of the model, and labels.
        file: Logits of the file, over the same rows.
    """
    before, after = (task.compute_metrics(prediction)[task.headline] for prediction in (model, file))
    resampled = task.bootstrap([model, file])
    low, high = np.quantile(resampled[0] - resampled[1], (0.025, 0.975))
    return QualityLoss(task.headline, before, after, (float(low), float(high)), len(model.label_ids))


def _texts(rows: Dataset) -> list[Text]:
    parts = [rows[name] for name in ("text", "text_pair") if name in rows.column_names]
    return [row if len(row) > 1 else row[0] for row in zip(*parts, strict=True)]
