"""A scoring pass resumes from its file, refuses another's, and is the same on two processes as on one."""

import os
import re

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from shrp_hf.plans.budget import Budget
from shrp_hf.scoring import HeadStats, StatsRequest, collect_head_stats
from shrp_hf.selectors import CahpSelector, HiesSelector

LENGTH = 7
NEURONS = StatsRequest(neurons=True, means=True)
TEXT = {
    "hidden_size": 16,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 8,
    "vocab_size": 40,
    "initializer_range": 0.3,
    "num_labels": 3,
}


def bert():
    return BertForSequenceClassification(BertConfig(**TEXT))


def text_batches(num_batches=4):
    batches = []
    for _ in range(num_batches):
        mask = (torch.arange(LENGTH) < torch.randint(2, LENGTH + 1, (6, 1))).long()
        tokens = torch.randint(2, 40, (6, LENGTH))
        batches.append({"input_ids": tokens, "attention_mask": mask, "labels": torch.arange(6) % 3})
    return batches


class Interrupted(Exception):
    pass


def interrupted_after(batches, count):
    yield from batches[:count]
    raise Interrupted


class CountedBert(BertForSequenceClassification):
    num_calls = 0

    def forward(self, *args, **kwargs):
        self.num_calls += 1
        return super().forward(*args, **kwargs)


def test_an_interrupted_pass_goes_on(tmp_path):
    model, batches = CountedBert(BertConfig(**TEXT)), text_batches(5)
    request = StatsRequest(importance=True, entropy=True, signature_size=5)
    expected = collect_head_stats(model, batches, request)
    cache = tmp_path / "stats.safetensors"
    with pytest.raises(Interrupted):
        collect_head_stats(model, interrupted_after(batches, 3), request, cache=cache, save_every=2)
    model.num_calls = 0
    resumed = collect_head_stats(model, batches, request, cache=cache, save_every=2)
    assert model.num_calls == 3
    model.num_calls = 0
    reread = collect_head_stats(model, iter(batches), request, cache=cache)
    assert model.num_calls == 0
    for stats in (resumed, reread, HeadStats.load(cache)):
        assert stats.request == request
        assert all(torch.equal(stats.sums[name], value) for name, value in expected.sums.items())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        pytest.param("weights", "belongs to another model", id="weights"),
        pytest.param("config", "belongs to another model", id="config"),
        pytest.param("order", "was made with other batches (shuffled, perhaps)", id="order"),
        pytest.param("fewer", "covers 4 batches, but only 2 were given", id="fewer"),
        pytest.param("request", "was made for other measurements or another number of batches", id="request"),
        pytest.param("noise", "holds no head statistics", id="noise"),
    ],
)
def test_a_file_of_another_pass_is_refused(tmp_path, change, reason):
    model, batches, request = bert(), text_batches(), StatsRequest(entropy=True)
    cache = tmp_path / "stats.safetensors"
    collect_head_stats(model, batches, request, cache=cache)
    if change == "weights":
        model.bert.encoder.layer[0].output.dense.bias.data += 1
    elif change == "config":
        model.config.layer_norm_eps = 0.1
    elif change == "order":
        batches.reverse()
    elif change == "fewer":
        batches = batches[:2]
    elif change == "request":
        request = StatsRequest(entropy=True, importance=True)
    else:
        cache.write_bytes(b"noise")
    before = cache.read_bytes()
    with pytest.raises(ValueError, match=re.escape(reason)) as error:
        collect_head_stats(model, batches, request, cache=cache)
    assert str(cache) in str(error.value)
    assert cache.read_bytes() == before


# --- several processes ---


def score_share(rank: int, folder: str) -> None:
    """Run by each of two processes: first a pass that one of them cannot finish, then the real one."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model, batches = torch.load(f"{folder}/input", weights_only=False)
    share = batches[rank::2]
    broken = [share[0] | {"input_ids": share[0]["input_ids"] * 0 - 1}] if rank else share
    try:
        collect_head_stats(model, broken, StatsRequest(entropy=True))
        outcome = "finished"
    except Exception as error:
        outcome = f"{type(error).__name__}: {error}"
    hies, cahp = selectors()
    stats = collect_head_stats(model, share, hies.request | cahp.request | NEURONS)
    plans = [selector.select(model, stats=stats) for selector in (hies, cahp)]
    torch.save((outcome, stats.sums, plans), f"{folder}/output{rank}")
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads abort now and then while the interpreter is torn down; all is written by now


def selectors():
    hies = HiesSelector(budget=Budget.heads(5))
    return hies, CahpSelector(budget=Budget.heads(4), signature_size=8, perplexity=3, max_iter=300)


def test_two_processes_equal_one(tmp_path):
    model, batches = bert().eval(), text_batches(8)
    torch.save((model, batches), tmp_path / "input")
    torch.multiprocessing.spawn(score_share, (str(tmp_path),), nprocs=2)
    hies, cahp = selectors()
    stats = collect_head_stats(model, batches, hies.request | cahp.request | NEURONS)
    plans = [selector.select(model, stats=stats) for selector in (hies, cahp)]
    outcomes = []
    for rank in range(2):
        outcome, sums, theirs = torch.load(tmp_path / f"output{rank}", weights_only=False)
        outcomes.append(outcome)
        assert theirs == plans
        assert sums.keys() == stats.sums.keys()
        for name, value in stats.sums.items():
            if value.dtype == torch.int64:
                assert torch.equal(sums[name], value), name
            # Means are sums of positive and negative numbers: where they cancel, the order of adding shows.
            torch.testing.assert_close(sums[name], value, rtol=1e-12, atol=1e-10 if "means" in name else 0)
    assert outcomes[0] == "RuntimeError: 1 other process(es) failed to score: their own message says why."
    assert outcomes[1].startswith("IndexError")
