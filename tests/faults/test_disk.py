"""A full disk or a target that cannot be written: one clear error that names the path, and what was there stays."""

import os
import platform
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertTokenizer

from shrp_hf import cli
from shrp_hf.export import export_onnx
from shrp_hf.models.modeling_shrp import ShrpModelMixin
from shrp_hf.plans.keep_plan import KeepPlan
from shrp_hf.pruning import to_shrp
from shrp_hf.publishing.report import write_text
from shrp_hf.scoring import StatsRequest, collect_head_stats
from tests.faults.isolation import FORK, silence
from tests.tiny import batch, tiny_bert
from tests.tiny_training import trainer_for

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad"]


def model(seed: int = 7) -> ShrpModelMixin:
    return to_shrp(tiny_bert(seed=seed, num_hidden_layers=1))


def save(folder: Path, seed: int = 7) -> Path:
    model(seed).save_pretrained(folder)
    return folder


def plan(folder: Path, seed: int = 7) -> Path:
    KeepPlan(((seed % 4,),) * 3, 4).to_json(folder / "plan.json")
    return folder / "plan.json"


def report(folder: Path, seed: int = 7) -> Path:
    write_text(folder / "report.md", f"{seed}" * 3000)
    return folder / "report.md"


def scores(folder: Path, seed: int = 7) -> Path:
    batches = [batch(seed=seed) | {"labels": torch.tensor([0, 1, 2, 0, 1])}]
    path = folder / "scores.safetensors"
    shutil.move(path, folder / "earlier") if path.exists() else None  # another pass is refused before anything is written
    try:
        collect_head_stats(model(seed), batches, StatsRequest(importance=True, signature_size=9), cache=path)
    finally:
        shutil.move(folder / "earlier", path) if (folder / "earlier").exists() else None
    return path


def export(folder: Path, seed: int = 7) -> Path:
    if not (folder / "vocab.txt").exists():
        (folder / "vocab.txt").write_text("\n".join(WORDS))
    export_onnx(model(seed), BertTokenizer(vocab=str(folder / "vocab.txt")), folder / "onnx")
    return folder / "onnx"


def checkpoint(folder: Path, seed: int = 7) -> Path:
    step = seed - 6  # so that a later training writes another folder
    trainer_for(folder, tiny_bert(num_labels=2), max_steps=step, save_strategy="steps", save_steps=step).train()
    return folder


WRITERS = {"model": save, "plan": plan, "report": report, "scores": scores, "export": export, "checkpoint": checkpoint}
LIMITS = {"model": (0, 1000, 20_000), "plan": (0, 10), "report": (0, 100), "scores": (0, 2000), "export": (0, 2000, 60_000)}
LIMITS["checkpoint"] = (0, 20_000, 200_000)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def on_a_full_disk(write: Callable[[Path, int], object], folder: Path, limit: int) -> str:
    """Writes in a child in which no file can be larger than `limit` bytes; returns its error."""
    receiver, sender = FORK.Pipe(duplex=False)

    def run() -> None:
        silence()
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            write(folder, 8)
            sender.send("written")
        except Exception as error:
            sender.send(f"{type(error).__name__}: {error}")

    process = FORK.Process(target=run)
    process.start()
    outcome = receiver.recv() if receiver.poll(120) else "hung"
    process.join(10)
    return outcome


@pytest.mark.faults
@pytest.mark.parametrize(("name", "limit"), [(name, limit) for name, limits in LIMITS.items() for limit in limits])
def test_a_full_disk_is_named_and_what_was_there_stays(name, limit, tmp_path, count):
    path = WRITERS[name](tmp_path, 7)
    before = contents(tmp_path)
    outcome = on_a_full_disk(WRITERS[name], tmp_path, limit)
    assert outcome.startswith("OSError: "), outcome
    assert f"`{path}`" in outcome
    assert "what was there is as it was" in outcome
    assert "\n" not in outcome
    after = contents(tmp_path)
    if name == "checkpoint":  # beside the earlier ones lies one that is not whole, which resuming passes over
        after = {file: value for file, value in after.items() if file in before}
    assert after == before
    count("full disks and closed targets", tried=1, refused=1, lost=0)


@pytest.mark.parametrize("name", [name for name in WRITERS if name not in ("export", "checkpoint")])
def test_a_file_in_the_place_of_the_directory_is_named(name, tmp_path):
    target = tmp_path / "there"
    target.write_text("a file")
    with pytest.raises(OSError, match=str(target)):
        WRITERS[name](target if name != "report" else target / "below", 7)
    assert target.read_text() == "a file"
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


@pytest.mark.parametrize("words", [("inspect", "/proc/nowhere"), ("export", "{model}", "--output", "/proc/nowhere")])
def test_the_command_line_says_it_in_one_line(words, tmp_path, monkeypatch, capsys):
    save(tmp_path / "model")
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizer(vocab=str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "model")
    monkeypatch.setattr("sys.argv", ["shrp-hf", *(word.format(model=tmp_path / "model") for word in words)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 1
    said = capsys.readouterr().err.strip().splitlines()
    assert [line for line in said if line.startswith("Error:")] == said[-1:]
    assert "/proc/nowhere" in said[-1]


def test_a_leftover_of_a_killed_writer_is_harmless_and_goes(tmp_path):
    dead = FORK.Process(target=lambda: None)
    dead.start()
    dead.join()
    machine = platform.node().replace(".", "-")
    of_dead, of_living, of_elsewhere = (
        tmp_path / f".plan.json.{writer}.partial"
        for writer in (f"{machine}.{dead.pid}", f"{machine}.{os.getppid()}", f"elsewhere-{machine}.{dead.pid}")
    )
    for left in (of_dead, of_living, of_elsewhere):
        left.write_text("{")
    plan(tmp_path)
    assert not of_dead.exists()
    assert of_living.exists()
    assert of_elsewhere.exists()
    os.utime(of_elsewhere, (0, 0))
    plan(tmp_path)
    assert not of_elsewhere.exists()
    assert of_living.exists()


def test_a_leftover_of_a_killed_save_is_harmless_and_goes(tmp_path):
    (tmp_path / ".saving-x").mkdir()
    (tmp_path / ".saving-x" / "config.json").write_text("{")
    save(tmp_path)
    AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir() if path.suffix != ".py"} == {"config.json", "model.safetensors"}
