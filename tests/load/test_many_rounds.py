"""Thousands of saves, loads and forward passes in one process: nothing is kept."""

import gc

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForSequenceClassification
from transformers.utils import logging

from shrp_hf import KeepPlan, prune_heads
from tests.load.conftest import resident
from tests.tiny import batch, tiny_routed

ROUNDS = 10_000
WARM_UP = 2_000  # memory was seen to rise once more, by 3.7 MiB at a stroke, after a thousand rounds
MAX_GROWTH = 1.0  # MiB in all: 105 bytes a round

pytestmark = pytest.mark.load


def growth(step, rounds=ROUNDS):
    """MiB by which the process grows over `rounds` calls, after some that fill what is filled once."""
    for _ in range(WARM_UP):
        step()
    gc.collect()
    before = resident()
    for _ in range(rounds):
        step()
    gc.collect()
    return resident() - before


def test_saving_loading_and_running_keep_nothing(tmp_path, figure):
    """Beyond what safetensors itself keeps: its 0.8.0 loses 64 bytes at each tensor that is read, whoever reads."""
    logging.disable_progress_bar()
    model, inputs = prune_heads(tiny_routed(2), KeepPlan(((1, 2), (2,), (0, 3)), 4)), batch()

    def read():
        with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (no mapping)
                file.get_slice(name)[...]

    def whole_round():
        model.save_pretrained(tmp_path)
        loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
        with torch.no_grad():
            loaded(**inputs)

    total = growth(whole_round)
    readers = growth(read)
    figure(f"{ROUNDS:,} rounds grew by {total:.1f} MiB, {readers:.1f} MiB of them by reading with safetensors alone")
    assert total - readers < MAX_GROWTH


def test_pruning_and_masking_keep_nothing(figure):
    model, plan = tiny_routed(2), KeepPlan(((1, 2), (2,), (0, 3)), 4)
    grown = growth(lambda: prune_heads(model, plan), rounds=2_000)
    figure(f"2,000 prunings grew by {grown:.1f} MiB")
    assert grown < MAX_GROWTH
