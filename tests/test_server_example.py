"""The server of the examples: requests that come in while a batch is computed are the next one, and errors reach who asked."""

import asyncio
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertTokenizer

from shrp_hf.export import ExportOptions, export_model
from tests.tiny import tiny_bert

pytest.importorskip("fastapi")
FOLDER = Path(__file__).parents[1] / "examples" / "serving"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "the", "film", "is"]


@pytest.fixture
def server():
    spec = importlib.util.spec_from_file_location("example_server", FOLDER / "server.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def folder(tmp_path):
    """A directory with a tokenizer and a config; no model is opened."""
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps({"id2label": {"0": "no", "1": "yes"}, "pad_token_id": 0}))
    (tmp_path / "model.onnx").touch()
    return tmp_path


class Runtime:
    """Says yes to `good`, and remembers what it was fed; the first batch takes until it is released."""

    def __init__(self):
        self.fed = []
        self.release = None

    def __call__(self, feed):
        self.fed.append(feed)
        if (feed["input_ids"] == 1).any():
            raise ValueError("no such word")
        if len(self.fed) == 1 and self.release is not None:
            self.release.result(timeout=60)
        good = (feed["input_ids"] == 5).any(axis=1)
        return np.stack([1.0 - good, 1.0 * good], axis=1)


def opened(server, folder, monkeypatch, max_batch=3):
    runtime = Runtime()
    names = ["input_ids", "attention_mask", "token_type_ids"]
    monkeypatch.setattr(server, "open_onnx", lambda path, threads: (names, runtime))
    return server.Classifier(folder, 1, max_batch, 8), runtime


def test_requests_that_wait_are_one_batch(server, folder, monkeypatch):
    model, runtime = opened(server, folder, monkeypatch)

    async def scenario():
        import concurrent.futures

        runtime.release = concurrent.futures.Future()
        worker = asyncio.create_task(model.work())
        first = asyncio.create_task(model.classify(["good"]))
        while not runtime.fed:
            await asyncio.sleep(0)
        others = [asyncio.create_task(model.classify([text])) for text in ("bad", "the film is good", "bad film", "good film")]
        while len(model.waiting) < 4:
            await asyncio.sleep(0)
        runtime.release.set_result(None)
        found = await asyncio.gather(first, *others)
        worker.cancel()
        return [answer["label"] for (answer,) in found]

    assert asyncio.run(scenario()) == ["yes", "no", "yes", "no", "yes"]
    assert [feed["input_ids"].shape for feed in runtime.fed] == [(1, 1), (3, 4), (1, 2)]
    assert runtime.fed[1]["attention_mask"].tolist() == [[1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0]]


def test_an_error_of_the_runtime_reaches_its_batch_alone(server, folder, monkeypatch):
    model, _ = opened(server, folder, monkeypatch)

    async def scenario():
        worker = asyncio.create_task(model.work())
        with pytest.raises(ValueError, match="no such word"):
            await model.classify(["unheard"])
        (answer,) = await model.classify(["good"])
        worker.cancel()
        return answer

    answer = asyncio.run(scenario())
    assert answer["label"] == "yes"
    assert answer["score"] == pytest.approx(np.e / (1 + np.e))


def test_a_directory_without_a_file_is_refused(server, folder):
    (folder / "model.onnx").unlink()
    with pytest.raises(ValueError, match=re.escape("holds no model.onnx and no model.xml")):
        server.Classifier(folder, 1, 3, 8)


@pytest.mark.slow
@pytest.mark.usefixtures("openvino_unrestricted")
@pytest.mark.parametrize("format", ["onnx", "openvino"])
def test_the_server_answers_under_load_without_torch(format, tmp_path):
    if format == "openvino":
        pytest.importorskip("openvino"), pytest.importorskip("nncf")
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS), encoding="utf-8")
    tokenizer = BertTokenizer(vocab=str(tmp_path / "vocab.txt"))
    for seed, name in enumerate(("first", "second")):
        options = ExportOptions(format, graph="portable")
        export_model(tiny_bert(num_labels=2, seed=seed), tokenizer, tmp_path / name, options)
    words = [tmp_path / "first", tmp_path / "second", "--clients", 1, 4, "--seconds", 1, "--rounds", 2, "--threads", 1]
    run = subprocess.run(
        [sys.executable, str(FOLDER / "load.py"), *map(str, words)], capture_output=True, text=True, check=False, timeout=300
    )
    assert run.returncode == 0, run.stderr
    assert "server without torch: True" in run.stdout
    rows = re.findall(r"^\| (first|second) \| (\d+) \| [\d.]+ \| [\d.]+ \| \d+ \| [\d.]+x \|$", run.stdout, re.MULTILINE)
    assert rows == [(name, clients) for clients in ("1", "4") for name in ("first", "second")]
