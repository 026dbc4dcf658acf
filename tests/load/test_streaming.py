"""A million sentences are scored in constant memory."""

import math
from collections.abc import Iterator

import pytest
import torch

from shrp_hf.scoring import StatsRequest, collect_head_stats
from tests.load.conftest import resident
from tests.tiny import tiny_bert

SENTENCES, BATCH, LENGTH = 1_000_000, 512, 12
MAX_GROWTH = 16.0  # MiB; the sentences alone, as int64 ids and masks, are 183 MiB

pytestmark = pytest.mark.load


class Sentences:
    """Batches that are drawn when they are asked for; looks at the memory now and then."""

    def __init__(self) -> None:
        self.memory: list[float] = []

    def __len__(self) -> int:
        return math.ceil(SENTENCES / BATCH)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        generator = torch.Generator().manual_seed(0)
        for start in range(0, SENTENCES, BATCH):
            size = min(BATCH, SENTENCES - start)
            ids = torch.randint(1, 99, (size, LENGTH), generator=generator)
            lengths = torch.randint(1, LENGTH + 1, (size, 1), generator=generator)
            labels = torch.randint(3, (size,), generator=generator)
            yield {"input_ids": ids, "attention_mask": (torch.arange(LENGTH) < lengths).long(), "labels": labels}
            if start // BATCH % 50 == 0:
                self.memory.append(resident())


def test_a_million_sentences_are_scored_in_constant_memory(tmp_path, figure):
    sentences = Sentences()
    request = StatsRequest(importance=True, salience=True, entropy=True, signature_size=8)
    stats = collect_head_stats(tiny_bert(), sentences, request, cache=tmp_path / "scores.safetensors", save_every=200)
    assert stats.sums["signature_counts"].sum() == SENTENCES
    assert stats.sums["entropy_counts"] == SENTENCES
    assert stats.importance().isfinite().all()
    warm = sentences.memory[4]  # after 200 batches, one save among them
    grown = max(sentences.memory[4:]) - warm
    figure(f"{SENTENCES:,} sentences grew by at most {grown:.1f} MiB over {warm:.0f} MiB")
    assert grown < MAX_GROWTH
