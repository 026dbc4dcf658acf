"""What an exported file is judged on: held-out rows, paired, and calibration rows that are none of them."""

import numpy as np
import pytest
from datasets import Dataset
from transformers import EvalPrediction

from shrp_hf.export import ExportOptions
from shrp_hf.tasks import Task
from shrp_hf.workflows.export_rows import quality_loss, rows_of_task

ROWS = 200
LABELS = np.arange(ROWS) % 2
CERTAIN = np.eye(2)[LABELS]  # logits that are right everywhere


def split(name, pair=False):
    columns = {"text": [f"{name} {i}" for i in range(ROWS)], "label": LABELS.tolist()}
    return Dataset.from_dict(columns | ({"text_pair": [f"pair {i}" for i in range(ROWS)]} if pair else {}))


def task(pair=False):
    parts = (split(name, pair) for name in ("train", "held out", "test"))
    return Task("t", *parts, ("no", "yes"), ("accuracy",), "test")


def wrong_in(count):
    logits = CERTAIN.copy()
    logits[:count] = 1 - logits[:count]
    return EvalPrediction(logits, LABELS)


@pytest.mark.parametrize(("wrong", "is_real"), [(0, False), (1, False), (20, True)])
def test_a_loss_is_real_when_it_is_large_and_no_chance(wrong, is_real):
    loss = quality_loss(task(), wrong_in(0), wrong_in(wrong))
    assert (loss.metric, loss.model, loss.rows) == ("accuracy", 1.0, ROWS)
    assert loss.file == pytest.approx(1 - wrong / ROWS)
    assert loss.interval[0] <= wrong / ROWS <= loss.interval[1]
    assert loss.is_real is is_real


def test_the_interval_is_paired():
    """Two models that are wrong in the same rows lose nothing, whatever rows are drawn."""
    assert quality_loss(task(), wrong_in(60), wrong_in(60)).interval == (0, 0)


def test_rows_are_held_out_and_calibration_is_none_of_them():
    rows = rows_of_task(task(), ExportOptions())
    assert rows.texts == [f"held out {i}" for i in range(ROWS)]
    assert rows.calibration is None
    static = ExportOptions("openvino", "int8-static")
    assert rows_of_task(task(), static).calibration == [f"train {i}" for i in range(ROWS)]
    assert rows_of_task(task(), static, ["own"]).calibration == ["own"]
    assert rows_of_task(task(pair=True), ExportOptions()).texts[1] == ("held out 1", "pair 1")
    assert rows.judge(CERTAIN, CERTAIN).file == 1
