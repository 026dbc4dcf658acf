"""The same seed gives the same bits: twice in a process, in another with another hash seed, and with more loader workers."""

import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

from shrp_hf.plans.budget import Budget
from shrp_hf.scoring import collect_head_stats
from shrp_hf.selectors import SELECTORS
from shrp_hf.selectors.cahp_math import HeadClusters, embed
from shrp_hf.selectors.dsp import DspCallback
from shrp_hf.tasks.splits import cut_by_text, cut_whole_sentences, sample
from tests.tiny import batch, tiny_bert, tiny_routed
from tests.tiny_training import bert, trainer_for

ROOT = Path(__file__).parents[1]
OPTIONS = {"cahp": {"signature_size": 8, "perplexity": 3, "max_iter": 300}, "cahp-direct": {"signature_size": 8}}
BUDGET = Budget.heads(5)
TEXTS = [f"a film{i} that is {mood}" for i in range(12) for mood in ("good", "bad", "good and bad", "film good")]


def stir(by):
    """Moves every global generator to where an unlucky caller might have left it."""
    random.seed(by)
    np.random.seed(by)
    torch.manual_seed(by)


def digest(tensors):
    """One hash of names and bits."""
    hashed = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        hashed.update(name.encode() + value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()


def selected(name):
    model = tiny_routed(2, num_labels=2) if name == "usage" else tiny_bert()
    if name == "usage":
        for layer in (1, 2):
            model.layers[layer].router.usage += torch.tensor([3, 1, 3, 2])
    data = [batch(seed=seed) | {"labels": torch.arange(5) % 3} for seed in range(4)]
    selector = SELECTORS[name](budget=BUDGET, **OPTIONS.get(name, {}))
    plan = selector.select(model, None if name == "usage" else data)
    return {"plan": plan.to_json(), "scores": digest({"": selector.scores})}


def trained(workers=0, seed=0):
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_for(Path(folder), num_expert_layers=2, dataloader_num_workers=workers, seed=seed)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        plan = trainer.usage_plan(keep=2)
        return {"plan": plan.to_json(), "weights": digest(trainer.model.state_dict()), "losses": losses}


def masked(seed=0):
    """Differentiable subset pruning: its plan, importances and weights."""
    with tempfile.TemporaryDirectory() as folder:
        dsp = DspCallback(num_heads=5, seed=seed)
        trainer = trainer_for(Path(folder), bert(), extra={"callbacks": [dsp]}, max_steps=4)
        trainer.train()
        return {"plan": dsp.plan.to_json(), "weights": digest(trainer.model.state_dict() | {"importances": dsp.importances})}


def clustered(seed=0):
    points = torch.rand(40, 6, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    plane = embed(points @ points.T, perplexity=5, max_iter=300, seed=seed)
    clusters = HeadClusters.in_plane(plane, seed)
    labels = torch.tensor(np.stack([clusters.labels(k) for k in (2, 5, 11, 23)]))
    return {"plane": digest({"": torch.tensor(plane)}), "labels": labels.tolist(), "curve": clusters.curve()}


def drawn(seed=0):
    rows = list(range(100))
    whole = cut_whole_sentences(TEXTS, size=6, seed=seed)
    return {"text": cut_by_text(TEXTS, size=6, seed=seed), "whole": whole, "sample": sample(rows, 9, seed)}


SEEDED = {"training": trained, "dsp": masked, "clusters": clustered, "draws": drawn}


def everything(by):
    """All results, as JSON would give them back."""
    found = {}
    for name in SELECTORS:
        stir(by)
        found[name] = selected(name)
    for name, run in SEEDED.items():
        stir(by)
        found[name] = run()
    return json.loads(json.dumps(found))


@pytest.fixture(scope="module")
def first():
    return everything(by=1)


def test_results_repeat_whatever_the_global_generators_held(first):
    assert everything(by=2) == first


def test_results_repeat_in_another_process_with_another_hash_seed(first):
    run = subprocess.run(
        [sys.executable, "-m", "tests.test_repeatability"],
        cwd=ROOT,
        env=os.environ | {"PYTHONHASHSEED": "4711"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout.splitlines()[-1]) == first


def test_workers_of_the_data_loader_change_nothing(first):
    assert json.loads(json.dumps(trained(workers=2))) == first["training"]


@pytest.mark.parametrize("name", SEEDED)
def test_another_seed_is_another_result(name, first):
    assert json.loads(json.dumps(SEEDED[name](seed=1))) != first[name]


def test_scoring_passes_repeat_bit_for_bit():
    data = [batch(seed=seed) | {"labels": torch.arange(5) % 3} for seed in range(4)]
    request = SELECTORS["cahp"](budget=BUDGET, **OPTIONS["cahp"]).request | SELECTORS["hies"](budget=BUDGET).request
    sums = []
    for by in (1, 2):
        stir(by)
        sums.append(digest(collect_head_stats(tiny_bert(), data, request).sums))
    assert sums[0] == sums[1]


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.stdout.write("\n" + json.dumps(everything(by=3)) + "\n")
