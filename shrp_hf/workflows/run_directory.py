"""The directory of a run: claimed by its options, its models kept whole, and opened again where shrp_hf is not imported."""

import copy
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from shrp_hf.card_parts import auto_class_of
from shrp_hf.files import remove_staged
from shrp_hf.models.outputs import JUDGED, embedding_of
from shrp_hf.publishing.report import write_text
from shrp_hf.tasks.sentence_folder import write_sentence_folder

_REOPEN = """
import sys, torch, transformers
auto = getattr(transformers, sys.argv[4])
model = auto.from_pretrained(sys.argv[1], trust_remote_code=True).double().eval()
assert "shrp_hf" not in sys.modules
with torch.inference_mode():
    torch.save(model(**torch.load(sys.argv[2], weights_only=True))[0], sys.argv[3])
"""
SAME = 1e-10
"""Most that outputs in float64 may differ between two processes: there no kernel's rounding comes near it, and no other weight
stays below it."""


def claim(folder: Path, identity: Mapping[str, Any]) -> None:
    """Makes `folder` the directory of the run that `identity` describes; the same run may take it up again.

    Raises:
        ValueError: It holds a run with another identity.
    """
    check_claim(folder, identity)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "run.json", json.dumps(identity, indent=2) + "\n")


def check_claim(folder: Path, identity: Mapping[str, Any]) -> None:
    """Refuses what `claim` refuses, and writes nothing.

    Raises:
        ValueError: `folder` holds a run with another identity.
    """
    path = folder / "run.json"
    if path.exists() and json.loads(path.read_text(encoding="utf-8")) != json.loads(json.dumps(identity)):
        raise ValueError(
            f"`output` {str(folder)!r} holds a run with another model, task or options (see run.json): choose another "
            "directory, or remove this one."
        )


def check_output(output: Path, models: Iterable[str | None], writes: Iterable[str] = ()) -> None:
    """Refuses an output directory in which a run would overwrite a model that it reads.

    Args:
        output: Where the run writes.
        models: Hub ids or directories of what it reads; None is skipped.
        writes: Folders that it makes in `output`.

    Raises:
        ValueError: A model's directory is `output`, or lies in one of those folders.
    """
    target = output.resolve()
    for name in models:
        folder = Path(name).expanduser().resolve() if name is not None and Path(name).expanduser().is_dir() else None
        if folder is None:
            continue
        if folder == target or any(folder.is_relative_to(target / part) for part in writes):
            raise ValueError(
                f"`output` {str(output)!r} would overwrite the model {name!r} that it is made from: give another directory."
            )


def kept_model(folder: Path, tokenizer: PreTrainedTokenizerBase, make: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    """Returns the model saved in `folder`, made and saved (with its code) first if it is not there yet."""
    if not (folder / "config.json").exists():  # written last, so its presence means that the model is whole
        save_model(make().eval(), tokenizer, folder)
    remove_staged(folder, ".saving-*")  # by a save that was killed when all was in its place
    return saved_model(folder)


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Saves a Shrp model with its tokenizer and its code; of an embedding model a whole SentenceTransformer.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        folder: Where to; `config.json` is written last.
    """
    tokenizer.save_pretrained(folder)
    embedding = embedding_of(model)
    if embedding is not None:
        write_sentence_folder(folder, embedding, model.config.hidden_size)
    model.save_pretrained(folder)


def saved_model(folder: Path) -> PreTrainedModel:
    """Opens a model that `save_model` has saved, by the class that its config names, in evaluation mode."""
    architecture = AutoConfig.from_pretrained(folder).architectures[0]
    head = architecture.partition("For")[2]
    return getattr(transformers, f"AutoModelFor{head}" if head else "AutoModel").from_pretrained(folder).eval()


def problem_when_reopened(folder: Path, model: PreTrainedModel, rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> str:
    """Opens the model in `folder` in a new process without importing shrp_hf, and compares the outputs with `model`'s.

    Nothing is raised: hours of training lie behind what is checked, so the caller reports what was found and keeps the rest.

    Args:
        folder: A model saved with its code.
        model: The same one; left as it is.
        rows: Tokenised rows; the first 8 are compared, in float64.
        tokenizer: Pads them.

    Returns:
        What is wrong: it does not open, or its outputs differ. Empty where nothing is.
    """
    rows = rows.select(range(min(8, len(rows))))
    rows = rows.remove_columns([name for name in ("label", JUDGED) if name in rows.column_names])
    inputs = dict(tokenizer.pad(rows[:], return_tensors="pt"))
    with tempfile.TemporaryDirectory() as scratch:
        given, got = Path(scratch, "inputs.pt"), Path(scratch, "outputs.pt")
        torch.save(inputs, given)
        command = [sys.executable, "-c", _REOPEN, str(folder.resolve()), str(given), str(got), auto_class_of(model)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=scratch, check=False)
        if done.returncode:
            return f"`{folder.name}` does not open in a new process:\n{done.stderr}"
        outputs = torch.load(got, weights_only=True)
    with torch.inference_mode():
        expected = copy.deepcopy(model).to("cpu", torch.float64).eval()(**inputs)[0]
    real = inputs["attention_mask"] == 1 if expected.dim() == 3 else ...
    difference = float((outputs - expected)[real].abs().max())
    if difference <= SAME * max(1.0, float(expected.abs().max())):
        return ""
    return f"`{folder.name}` gives other outputs in a new process, by up to {difference:.1e} in float64."
