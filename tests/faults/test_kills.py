"""SIGKILL at random moments, the same command again: it ends with what an uninterrupted run ends with."""

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, BertTokenizer

import shrp_hf.export
import shrp_hf.tasks.loading

# Imported here so that the forked children find them in memory: a command then starts in milliseconds.
import shrp_hf.workflows.compare
import shrp_hf.workflows.prune
import shrp_hf.workflows.train  # noqa: F401
from shrp_hf import cli
from shrp_hf.plans.keep_plan import KeepPlan
from shrp_hf.pruning import prune_heads, to_shrp
from shrp_hf.scoring import HeadStats
from tests.faults.isolation import FORK, silence
from tests.tiny import same_state, tiny_bert, tiny_routed

KILLS = int(os.environ.get("KILLS", "20"))
SEED = int(os.environ.get("FAULTS_SEED", "0"))
GOOD, BAD = ("good", "great", "fine", "warm"), ("bad", "dull", "poor", "cold")
FILLERS = ("the", "film", "is", "very", "and", "a", "story")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "SST-2"
    folder.mkdir()
    rng = random.Random(0)
    for name, size in (("train.tsv", 48), ("test.tsv", 16)):
        lines = ["sentence\tlabel"]
        for i in range(size):
            lines.append(f"{' '.join(rng.choices(FILLERS, k=4))} {rng.choice(GOOD if i % 2 else BAD)} {name[:2]}{i}\t{i % 2}")
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder.parent


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *GOOD, *BAD, *FILLERS]
    (folder / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    tiny_bert(num_labels=2, num_hidden_layers=2).save_pretrained(folder)
    BertTokenizer(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


class Run:
    """A function in a forked child with a process group of its own, so that a kill takes all that it started."""

    def __init__(self, function: Callable[[], None], log: Path) -> None:
        self.log = log
        self.process = FORK.Process(target=self._run, args=(function,))
        self.process.start()
        self.start = time.monotonic()

    def _run(self, function: Callable[[], None]) -> None:
        os.setpgid(0, 0)
        silence(self.log)
        function()
        sys.stdout.flush()
        os._exit(0)

    def finish(self) -> float:
        """Waits for its end, which must be a good one; returns the seconds it took."""
        self.process.join(300)
        assert self.process.exitcode == 0, self.log.read_text(errors="replace")[-3000:]
        return time.monotonic() - self.start

    def kill(self, after: float) -> bool:
        """Kills it after so many seconds; returns whether it was still running."""
        self.process.join(after)
        if self.process.exitcode is not None:
            return False
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.join()
        return True


def command(*words: object) -> Callable[[], None]:
    def run() -> None:
        sys.argv = ["shrp-hf", *map(str, words)]
        cli.main()

    return run


def train(output: Path, plain: Path, data_dir: Path) -> Callable[[], None]:
    options = ("--num-expert-layers", 1, "--dense-epochs", 2, "--recovery-epochs", 4, "--batch-size", 8, "--max-length", 16)
    return command("train", plain, "--dataset", "sst2", "--data-dir", data_dir, "--output", output, *options)


def prune(output: Path, plain: Path, data_dir: Path) -> Callable[[], None]:
    options = ("--selector", "hies", "--keep", 0.5, "--recovery-epochs", 1, "--batch-size", 2, "--max-length", 16)
    return command("prune", plain, "--dataset", "sst2", "--data-dir", data_dir, "--output", output, *options)


def compare(output: Path, plain: Path, data_dir: Path) -> Callable[[], None]:
    options = ("--selectors", "his", "--keep", "0.5", "--expert-layers", "1", "--truncate", "1", "--seeds", "0")
    options += ("--recovery-epochs", "1", "--batch-size", 8, "--max-length", 16, "--no-speed", "--force")
    return command("compare", plain, "--dataset", "sst2", "--data-dir", data_dir, "--output", output, *options)


def export(output: Path, plain: Path, data_dir: Path) -> Callable[[], None]:
    return command("export", plain, "--graph", "fused", "--output", output)  # which is faster would be chance


def killed_at_move(function: Callable[[], None], at: int | None, moves: Path) -> Callable[[], None]:
    """Kills the process group just before its move number `at` of a file; adds a dot to the file `moves` for each."""
    replace = os.replace

    def counted(*paths: object, **options: object) -> None:
        with moves.open("a+", encoding="utf-8") as file:
            file.seek(0)
            done = len(file.read())
            file.write(".")
        if done == at:
            os.killpg(0, signal.SIGKILL)
        replace(*paths, **options)

    def run() -> None:
        os.replace = counted
        function()

    return run


def models_in(folder: Path) -> list[Path]:
    """The models in there, except checkpoints and what lies in a hidden folder: a save that did not come to its end."""
    found = sorted(path.parent for path in folder.rglob("config.json") if "checkpoints" not in path.parts)
    return [path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts)]


def check_nothing_half_written(folder: Path) -> None:
    """What a killed run left: a folder with a config is a whole model; a plan, a cache and every table can be read."""
    for model in models_in(folder):
        if not (model / "onnx.json").exists():
            AutoModelForSequenceClassification.from_pretrained(model)
    for path in (path for path in folder.rglob("*.json") if not path.name.startswith(".") and "checkpoints" not in path.parts):
        if not any(part.startswith(".") for part in path.relative_to(folder).parts):
            json.loads(path.read_text(encoding="utf-8"))
    for path in folder.rglob("scores.safetensors"):
        HeadStats.load(path)
    for path in folder.rglob("plan.json"):
        KeepPlan.from_json(path)


def check_same(ours: Path, theirs: Path) -> None:
    """The same models bit for bit, the same plan, cells and table, and nothing of a kill beside them."""
    assert [path.relative_to(ours) for path in models_in(ours)] == [path.relative_to(theirs) for path in models_in(theirs)]
    for path in models_in(ours):
        for weights in path.glob("model*.safetensors"):
            mine, other = load_file(weights), load_file(theirs / weights.relative_to(ours))
            assert mine.keys() == other.keys()
            for name, value in mine.items():
                assert torch.equal(value, other[name]), f"{weights}: {name}"
    for name in ("plan.json", "model.onnx"):
        assert (ours / name).exists() == (theirs / name).exists()
        if (ours / name).exists():
            assert (ours / name).read_bytes() == (theirs / name).read_bytes()
    cells = sorted(path.name for path in (theirs / "cells").glob("*.json"))
    assert sorted(path.name for path in (ours / "cells").glob("*.json")) == cells
    for name in cells:
        mine, other = (json.loads((folder / "cells" / name).read_text()) for folder in (ours, theirs))
        for timed in ("seconds", "part_seconds"):
            mine.pop(timed, None), other.pop(timed, None)
        assert mine == other
    assert not [path for path in ours.rglob(".*") if "checkpoints" not in path.parts]


def first_model() -> object:
    return prune_heads(tiny_bert(), KeepPlan(((0, 3), (), (1,)), 4))


def second_model() -> object:
    return prune_heads(tiny_routed(2), KeepPlan(((1, 2), (2,), (0, 3)), 4))


SCENARIOS = {"train": (train, 0.35), "prune": (prune, 0.25), "compare": (compare, 0.25), "export": (export, 0.15)}


@pytest.mark.faults
@pytest.mark.parametrize("name", SCENARIOS)
def test_a_killed_command_started_again_ends_alike(name, plain, data_dir, tmp_path, count):
    make, share = SCENARIOS[name]
    kills, rng = max(1, round(share * KILLS * 0.75)), random.Random(f"{SEED} {name}")
    whole = tmp_path / "whole"
    length = Run(make(whole, plain, data_dir), tmp_path / "log").finish()
    done = 0
    while done < kills:
        output, log = tmp_path / f"killed-{done}", tmp_path / f"log-{done}"
        moments = []
        for _ in range(min(rng.choice((1, 1, 2)), kills - done)):  # some are killed twice on their way
            moments.append(rng.uniform(0, length))
            done += Run(make(output, plain, data_dir), log).kill(moments[-1])
            if output.exists():
                check_nothing_half_written(output)
        Run(make(output, plain, data_dir), log).finish()
        try:
            check_same(output, whole)
        except AssertionError as error:
            raise AssertionError(f"seed {SEED}, killed after {moments} of {length:.2f} s: {error}") from error
        shutil.rmtree(output)
    count("kills", tried=done, resumed=done, lost=0)


@pytest.mark.faults
@pytest.mark.parametrize("name", SCENARIOS)
def test_a_command_killed_as_it_moves_a_file_ends_alike(name, plain, data_dir, tmp_path, count):
    """The moments at which most lies about half done: all files are there, the last one under its temporary name."""
    make, _ = SCENARIOS[name]
    moves = tmp_path / "moves"
    whole = tmp_path / "whole"
    Run(killed_at_move(make(whole, plain, data_dir), None, moves), tmp_path / "log").finish()
    total = len(moves.read_text())
    rng = random.Random(f"{SEED} {name} moves")
    chosen = sorted({0, *rng.sample(range(total), min(total, max(1, KILLS // 10)))})
    for move in chosen:
        output = tmp_path / f"killed-{move}"
        run = Run(killed_at_move(make(output, plain, data_dir), move, tmp_path / "none"), tmp_path / "log")
        run.process.join()
        assert run.process.exitcode == -signal.SIGKILL
        check_nothing_half_written(output)
        Run(make(output, plain, data_dir), tmp_path / "log").finish()
        check_same(output, whole)
    count("kills", tried=len(chosen), resumed=len(chosen), lost=0)


@pytest.mark.faults
def test_a_killed_save_leaves_the_earlier_model_the_new_one_or_none(tmp_path, count):
    """Two models of other shapes are saved over each other until the kill comes."""
    models = [first_model(), to_shrp(tiny_bert()), second_model()]
    kills, rng = max(1, round(0.25 * KILLS)), random.Random(f"{SEED} save")
    target = tmp_path / "model"

    def save_on() -> None:
        for i in range(10_000):
            models[i % 3].save_pretrained(target, max_shard_size="1GB" if i % 2 else "20KB")

    models[0].save_pretrained(target)
    for _ in range(kills):
        assert Run(save_on, tmp_path / "log").kill(rng.uniform(0.05, 1.5))
        if (target / "config.json").exists():
            opened = AutoModelForSequenceClassification.from_pretrained(target)
            assert any(same_state(opened, model) for model in models)
        else:
            with pytest.raises((OSError, ValueError)):
                AutoModelForSequenceClassification.from_pretrained(target)
        models[1].save_pretrained(target)
        assert sorted(path.name for path in target.iterdir()) == ["config.json", "model.safetensors"]
    count("kills", tried=kills, resumed=kills, lost=0)
