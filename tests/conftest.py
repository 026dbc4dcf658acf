"""What every test stands on: no network, caches of its own, one thread per worker, a fixed seed."""

import gc
import os
import random
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_CACHES = tempfile.TemporaryDirectory(prefix="shrp-hf-tests-")
# Set before Transformers is imported, which reads them once; processes that tests start inherit them.
os.environ |= {
    "HF_HOME": _CACHES.name,
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "MPLBACKEND": "Agg",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

from shrp_hf.export import onnx as export  # noqa: E402
from shrp_hf.export import runtime  # noqa: E402
from shrp_hf.measuring import latency, timing  # noqa: E402

torch.set_num_threads(1)
_LASTS = ((timing, "MIN_ROUND_SECONDS"), (runtime, "MIN_SECONDS"), (latency, "_SECONDS"))
_SECONDS = [getattr(module, name) for module, name in _LASTS]


@pytest.hookimpl(tryfirst=True)  # before fixtures of modules
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Lets a measurement end after its fewest calls: fast tests judge no time."""
    is_slow = any(item.get_closest_marker(name) for name in ("slow", "load"))
    for (module, name), seconds in zip(_LASTS, _SECONDS, strict=True):
        setattr(module, name, seconds if is_slow else 0.0)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="module", autouse=True)
def _earlier_frozen() -> None:
    """Trainer collects garbage whenever it starts, and would look through all that was ever imported or cached."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def traced_graphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `traced_once` keeps its graphs."""
    return tmp_path_factory.mktemp("traced")


@pytest.fixture
def traced_once(traced_graphs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traces each ONNX graph of a model once, whatever is made of it: tracing costs seconds."""
    write_graph = export.write_graph

    def write(model: Any, given: Mapping, outputs: Sequence[str], path: Path, form: Any) -> None:
        weights = tuple(float(weight.detach().double().sum()) for weight in model.parameters())
        kept = traced_graphs / f"{hash((type(model), weights, tuple(given), tuple(outputs), form))}.onnx"
        if not kept.exists():
            write_graph(model, given, outputs, kept, form)
        shutil.copy(kept, path)

    monkeypatch.setattr(export, "write_graph", write)


@pytest.fixture
def openvino_unrestricted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets OpenVINO see the processor that is there.

    Its own oneDNN obeys the variable by which `tests.processors` holds torch's back, while the rest of it goes by the
    processor, and the two contradict each other ("MVN node: bad combination"). Everything else stays held back.
    """
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
