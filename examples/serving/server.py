"""Serves exported classifiers over HTTP: ONNX Runtime or OpenVINO and a tokenizer, no torch, no Transformers.

Requests that come in while a batch is computed are the next batch, so batches grow with the load and nobody waits for a
timer. A model is a directory that `shrp-hf export` wrote; its name in the address is that of the directory.

pip install 'shrp_hf[serve]'  # or only: onnxruntime tokenizers fastapi uvicorn
python examples/serving/server.py out/onnx out/openvino --port 8000 --threads 2
curl -s localhost:8000/onnx -H 'content-type: application/json' -d '{"texts": ["Opens a file.", "Inverts a matrix."]}'
"""

import argparse
import asyncio
import json
import sys
from collections import deque
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import FastAPI, HTTPException
from pydantic import BaseModel, Field
from tokenizers import Encoding, Tokenizer

COLUMNS = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}


def open_onnx(path: Path, threads: int) -> tuple[list[str], Any]:
    """Returns the inputs' names and a function from arrays to logits, in ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.force_spinning_stop", "1")  # the tokenizer needs the cores between batches
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return [node.name for node in session.get_inputs()], lambda feed: session.run(["logits"], feed)[0]


def open_openvino(path: Path, threads: int) -> tuple[list[str], Any]:
    """The same in OpenVINO; a float32 file is computed in float32."""
    import openvino

    options: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
    if json.loads(path.with_name("openvino.json").read_text(encoding="utf-8"))["precision"] == "float32":
        options["INFERENCE_PRECISION_HINT"] = "f32"
    compiled = openvino.Core().compile_model(path, "CPU", options)
    request = compiled.create_infer_request()
    return [port.get_any_name() for port in compiled.inputs], lambda feed: np.array(request.infer(feed)["logits"])


class Classifier:
    """A model, its tokenizer, and the queue in front of them.

    Args:
        folder: What `shrp-hf export` wrote.
        threads: CPU threads of the runtime.
        max_batch: Most texts in a batch.
        max_length: Most tokens of a text that are read.
    """

    def __init__(self, folder: Path, threads: int, max_batch: int, max_length: int) -> None:
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.no_padding()
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.tokenizer.enable_truncation(min(max_length, config.get("max_position_embeddings", max_length)))
        self.labels, self.padding = config["id2label"], config.get("pad_token_id") or 0
        files = [path for path in (folder / "model.xml", folder / "model.onnx") if path.exists()]
        if not files:
            raise ValueError(f"{folder} holds no model.onnx and no model.xml: write one with `shrp-hf export`.")
        self.names, self.compute = (open_openvino if files[0].suffix == ".xml" else open_onnx)(files[0], threads)
        self.max_batch = max_batch
        self.waiting: deque[tuple[Encoding, asyncio.Future]] = deque()
        self.arrived = asyncio.Event()
        self.worker = ThreadPoolExecutor(1)  # the runtime's own threads do the work

    async def classify(self, texts: list[str]) -> list[dict[str, Any]]:
        """Answers one request; its texts may share batches with others."""
        futures = [asyncio.get_running_loop().create_future() for _ in texts]
        self.waiting.extend(zip(self.tokenizer.encode_batch(texts), futures, strict=True))
        self.arrived.set()
        return [self._answer(logits) for logits in await asyncio.gather(*futures)]

    async def work(self) -> None:
        """Computes batch after batch."""
        loop = asyncio.get_running_loop()
        while True:
            await self.arrived.wait()
            batch = [self.waiting.popleft() for _ in range(min(len(self.waiting), self.max_batch))]
            if not self.waiting:
                self.arrived.clear()
            if not batch:
                continue
            try:
                found = await loop.run_in_executor(self.worker, self._run, [encoding for encoding, _ in batch])
            except Exception as error:  # whatever the runtime raises is the answer of this batch, and the next one is served
                found = [error] * len(batch)
            for (_, future), logits in zip(batch, found, strict=True):
                if future.done():  # the client has gone
                    continue
                if isinstance(logits, Exception):
                    future.set_exception(logits)
                else:
                    future.set_result(logits)

    def _run(self, encodings: list[Encoding]) -> np.ndarray:
        """Pads to the longest and computes logits, (batch, labels)."""
        shape = (len(encodings), max(len(encoding.ids) for encoding in encodings))
        feed = {name: np.full(shape, self.padding if name == "input_ids" else 0, dtype=np.int64) for name in self.names}
        for row, encoding in enumerate(encodings):
            for name, array in feed.items():
                array[row, : len(encoding.ids)] = getattr(encoding, COLUMNS[name])
        return self.compute(feed)

    def _answer(self, logits: np.ndarray) -> dict[str, Any]:
        shares = np.exp(logits - logits.max())
        best = int(logits.argmax())
        return {"label": self.labels[str(best)], "score": float(shares[best] / shares.sum())}


class Request(BaseModel):
    """What is posted."""

    texts: list[str] = Field(min_length=1, max_length=256)


def make_app(folders: list[Path], threads: int, max_batch: int, max_length: int) -> FastAPI:
    """Makes the application: `POST /{name of the directory}` and `GET /health`."""
    models: dict[str, Classifier] = {}

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        models.update({folder.name: Classifier(folder, threads, max_batch, max_length) for folder in folders})
        tasks = [asyncio.create_task(model.work()) for model in models.values()]
        yield
        for task in tasks:
            task.cancel()

    app = FastAPI(lifespan=lifespan)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        heavy = [name for name in ("torch", "transformers", "shrp_hf") if name in sys.modules]
        return {"models": list(models), "imported": heavy}

    @app.post("/{name}")
    async def classify(name: str, request: Request) -> list[dict[str, Any]]:
        if name not in models:
            raise HTTPException(404, f"There is no model {name!r}, only {list(models)}.")
        return await models[name].classify(request.texts)

    return app


def main() -> None:
    """Starts the server."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path, help="directories that `shrp-hf export` wrote, of different names")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of each model")
    parser.add_argument("--max-batch", type=int, default=32, help="most texts in a batch")
    parser.add_argument("--max-length", type=int, default=128, help="most tokens of a text")
    words = parser.parse_args()
    if len({folder.name for folder in words.models}) < len(words.models):
        parser.error("the directories must have different names: they are the models' addresses")
    import uvicorn

    app = make_app(words.models, words.threads, words.max_batch, words.max_length)
    uvicorn.run(app, host="127.0.0.1", port=words.port, log_level="warning")


if __name__ == "__main__":
    main()
