"""The rows of a task that an exported file is compared, judged and calibrated on."""

from collections.abc import Sequence

import numpy as np
from transformers import EvalPrediction

from shrp_hf.export.options import ExportOptions, ExportRows, QualityLoss, Text
from shrp_hf.tasks.kinds import LABEL_KINDS
from shrp_hf.tasks.task import Task


def rows_of_task(task: Task, options: ExportOptions, calibration: Sequence[Text] | None = None) -> ExportRows:
    """Takes the held-out rows, never the reported ones; static int8 finds its scales on training rows.

    A file's quality is judged where a row has labels of its own (classes, numbers).

    Args:
        task: The task, as small as the comparison may take.
        options: What is written.
        calibration: Texts to find the scales on instead.
    """
    texts = task.kind.texts
    if options.precision == "int8-static" and calibration is None:
        calibration = texts(task.train)
    if task.kind.name not in LABEL_KINDS:  # an answer for each token, a vector, a rank: their agreement alone is looked at
        return ExportRows(texts(task.validation), calibration=calibration)
    labels = np.asarray(task.validation["label"])

    def judge(model: np.ndarray, file: np.ndarray) -> QualityLoss:
        return quality_loss(task, EvalPrediction(model, labels), EvalPrediction(file, labels))

    return ExportRows(texts(task.validation), judge, calibration)


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
