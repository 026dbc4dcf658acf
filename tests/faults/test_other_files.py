"""Damaged plans, score caches, run claims and records: refused by our own error, or read as what they say."""

import json
import os
import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import BertForSequenceClassification

from shrp_hf.plans.keep_plan import KeepPlan
from shrp_hf.scoring import HeadStats, StatsRequest, collect_head_stats
from shrp_hf.scoring.stats import _checksum
from tests.faults.fuzzing import WILD, flip, garble, nest, replace_by_no_file, truncate
from tests.faults.isolation import in_children
from tests.tiny import batch, tiny_bert

PLAN = KeepPlan(((0, 2), (1,), (0, 1, 2, 3)), 4)
REQUEST = StatsRequest(importance=True, entropy=True, signature_size=3)


def wild_json(path: Path, rng: random.Random) -> None:
    fields = json.loads(path.read_text())
    name = rng.choice(sorted(fields))
    fields[rng.choice((name, name, name[:-1]))] = rng.choice(WILD)
    path.write_text(json.dumps(fields))


def wild_text(path: Path, rng: random.Random) -> None:
    choices = ("", "null", "[]", "1", '"x"', "{}", "NaN", '{"kept": [[0]]', "9" * 5000, '{"num_heads": ' + "9" * 5000 + "}")
    path.write_text(rng.choice(choices))


def signed(path: Path, rng: random.Random) -> None:
    """A crafted score cache whose checksum is right and whose sums are not those of its request."""
    with safe_open(path, framework="pt") as file:
        texts = dict(file.metadata())
        sums = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    del texts["sha256"]
    if rng.random() < 0.5:
        name = rng.choice(sorted(sums))
        made = (sums[name][:-1], sums[name][None], sums[name].to(torch.float32), torch.zeros(0), None)
        sums[name] = rng.choice(made)
        if sums[name] is None:
            del sums[name]
    else:
        described = json.loads(texts["head_stats"])
        described[rng.choice(sorted(described))] = rng.choice([value for value in WILD if not isinstance(value, float)])
        texts["head_stats"] = json.dumps(described)
    sums = {name: value.contiguous().clone() for name, value in sums.items()}
    save_file(sums, path, metadata=texts | {"sha256": _checksum(sums, texts)})


ANY = (truncate, flip, flip, garble, replace_by_no_file)
TEXT = (*ANY, nest, wild_json, wild_json, wild_json, wild_text)


def read_plan(path: Path) -> str:
    plan = KeepPlan.from_json(path)
    assert KeepPlan.from_json(plan.to_json()) == plan
    return "equal" if plan == PLAN else "survived"


def model() -> BertForSequenceClassification:
    return tiny_bert(num_hidden_layers=2)


def batches() -> list[dict[str, torch.Tensor]]:
    return [batch(size=6, seed=i) | {"labels": torch.arange(6) % 3} for i in range(2)]


def read_scores(path: Path) -> str:
    """Nothing survives here: a cache is as it was written, or refused, because nobody would notice other scores."""
    stats = HeadStats.load(path)
    whole = HeadStats.load(path.with_name("whole.safetensors"))
    assert stats.sums.keys() == whole.sums.keys()
    assert all(torch.equal(stats.sums[name], value) for name, value in whole.sums.items())
    return "equal"


def go_on_scoring(path: Path) -> str:
    stats = collect_head_stats(model(), batches(), REQUEST, cache=path)
    whole = HeadStats.load(path.with_name("whole.safetensors"))
    assert all(torch.equal(stats.sums[name], value) for name, value in whole.sums.items())
    return "equal"


def try_file(case: tuple) -> tuple[str, str]:
    """Damages a copy of a file and reads it: ("refused" | "equal" | "survived" | "lost", why)."""
    source, damage, read, seed = case
    path = source.with_name(f"{os.getpid()}-{source.name}")
    shutil.copy(source, path)
    try:
        damage(path, random.Random(f"{damage.__name__} {read.__name__} {seed}"))
        return read(path), ""
    except (ValueError, OSError) as error:
        # json's own errors are ValueErrors too, but say nothing of a plan.
        ours = isinstance(error, OSError) or any(word in str(error) for word in ("plan", "head statistics", "damaged", "`"))
        return "refused" if ours else "lost", f"{type(error).__name__}: {error}"
    except Exception as error:
        return "lost", f"{type(error).__name__}: {error}"
    finally:
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def make_plan(folder: Path) -> Path:
    PLAN.to_json(folder / "plan.json")
    return folder / "plan.json"


def make_scores(folder: Path) -> Path:
    collect_head_stats(model(), batches(), REQUEST, cache=folder / "whole.safetensors")
    shutil.copy(folder / "whole.safetensors", folder / "scores.safetensors")
    return folder / "scores.safetensors"


KINDS: dict[str, tuple[Any, Any, tuple, int]] = {
    "plan": (make_plan, read_plan, TEXT, 20),
    "scores": (make_scores, read_scores, (*ANY, signed, signed, signed), 20),
    "scores of a pass that goes on": (make_scores, go_on_scoring, (*ANY, signed), 4),
}


@pytest.mark.faults
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_are_refused_or_read_as_they_are(kind, tmp_path, count):
    make, read, damages, seeds = KINDS[kind]
    source = make(tmp_path)
    cases = [(source, damage, read, f"{i} {seed}") for i, damage in enumerate(damages) for seed in range(seeds)]
    outcomes = [outcome or ("lost", what) for outcome, what in in_children(try_file, cases)]
    counts = Counter(outcome for outcome, _ in outcomes)
    figures = {name: counts[name] for name in ("refused", "survived", "equal", "lost")}
    count("plan and score files", tried=len(cases), **figures)
    lost = [f"{c[1].__name__}, {c[3]}: {why}" for c, (kind, why) in zip(cases, outcomes, strict=True) if kind == "lost"]
    assert not lost, "\n".join(lost)
    assert counts["refused"] > len(cases) / 2
