"""The shape of BERT-large (24 layers of 16 heads) goes through every system within 16 GiB. The worker is this file."""

import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from shrp_hf import Budget, CahpSelector, HiesSelector, KeepPlan, ShrpBertForSequenceClassification, prune_heads, to_shrp
from shrp_hf.scoring import collect_head_stats

ROOT = Path(__file__).parents[2]
LIMIT = 16.0  # GiB
LAYERS, HEADS = 24, 16

pytestmark = pytest.mark.load


def bert_large() -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=1024, num_hidden_layers=LAYERS, num_attention_heads=HEADS, intermediate_size=4096, initializer_range=0.05
    )
    return BertForSequenceClassification(config).eval()


def batches(count: int = 4, size: int = 4, length: int = 32) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "input_ids": torch.randint(1, 30_000, (size, length), generator=generator),
            "attention_mask": torch.ones(size, length, dtype=torch.long),
            "labels": torch.arange(size) % 2,
        }
        for _ in range(count)
    ]


def run(folder: str) -> dict:
    """Everything in turn; seconds and highest memory so far (GiB) of each step, and the sizes that come out."""
    steps, found, began = {}, {}, time.perf_counter()

    def done(name: str) -> None:
        nonlocal began
        steps[name] = (time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
        began = time.perf_counter()

    model, data = bert_large(), batches()
    inputs = {name: value for name, value in data[0].items() if name != "labels"}
    done("build")
    hies, cahp = HiesSelector(budget=Budget.fraction(0.5)), CahpSelector(budget=Budget.knee(4))
    stats = collect_head_stats(model, data, hies.request | cahp.request)
    done("score")
    plans = {"hies": hies.select(model, stats=stats), "cahp": cahp.select(model, stats=stats)}
    done("choose")
    for name, plan in plans.items():
        pruned = prune_heads(model, plan)
        pruned.save_pretrained(f"{folder}/{name}")
        loaded = ShrpBertForSequenceClassification.from_pretrained(f"{folder}/{name}")
        with torch.no_grad():
            found[name] = (plan.num_kept, bool(loaded(**inputs).logits.isfinite().all()))
        del pruned, loaded
        done(f"prune by {name}, save, load, run")
    routed = to_shrp(model)
    routed.convert_layers_(LAYERS - 1)
    routed.train()(**data[0]).loss.backward()
    routed.zero_grad(set_to_none=True)
    done("convert 23 layers, one training pass")
    keep_one = KeepPlan((tuple(range(HEADS)), *[(0,)] * (LAYERS - 1)), HEADS)
    routed.eval().prune_heads(keep_one)
    with torch.no_grad():
        is_finite = bool(routed(**inputs).logits.isfinite().all())
    found["shrp"] = (sum(parameter.numel() for parameter in routed.base_model.encoder.parameters()), is_finite)
    done("prune to one expert")
    return {"steps": steps, "found": found}


def test_bert_large_goes_through_within_16_gib(tmp_path, figure):
    worker = subprocess.run([sys.executable, __file__, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert worker.returncode == 0, worker.stderr
    result = json.loads(worker.stdout.splitlines()[-1])
    for name, (seconds, peak) in result["steps"].items():
        figure(f"{name}: {seconds:.0f} s, peak {peak:.1f} GiB")
    assert result["found"]["hies"] == [LAYERS * HEADS // 2, True]
    kept, is_finite = result["found"]["cahp"]
    assert LAYERS < kept < LAYERS * HEADS // 2
    assert is_finite
    # One ordinary layer of BERT-large, and 23 of Q, K, V of one expert and the expander.
    one_expert = 3 * (1024 + 1) * 64 + (64 + 1) * 1024 + 2 * 1024
    assert result["found"]["shrp"] == [12_596_224 + (LAYERS - 1) * one_expert, True]
    assert max(peak for _, peak in result["steps"].values()) < LIMIT


if __name__ == "__main__":
    sys.stdout.write("\n" + json.dumps(run(sys.argv[1])) + "\n")
