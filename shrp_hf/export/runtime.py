"""ONNX Runtime: opening a file, timing files in turns, and turning one into int8."""

import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

MIN_ROUNDS, MIN_SECONDS = 5, 1.0  # of timing
EXTRA = "Exporting to ONNX needs onnx, onnxscript and onnxruntime: pip install 'shrp_hf[onnx]'"


def onnx_session(path: str | Path, num_threads: int | None = None) -> Any:
    """Opens an ONNX file in ONNX Runtime on the CPU.

    Args:
        path: The file, or the directory that `export_onnx` wrote.
        num_threads: Threads within an operator; None leaves ONNX Runtime's choice, all cores.

    Returns:
        An `onnxruntime.InferenceSession`.

    Raises:
        ImportError: The extra `onnx` is not installed.
        ValueError: There is no such file, or `num_threads` is below 1.
    """
    path = Path(path)
    path = path / "model.onnx" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"`path` must be an ONNX file or a directory that holds `model.onnx`, got {str(path)!r}.")
    if num_threads is not None and num_threads < 1:
        raise ValueError(f"`num_threads` must be at least 1, got {num_threads}.")
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError(EXTRA) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads or 0
    # Between calls its threads would go on spinning, at the cost of whatever else the process computes.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def own_operators(path: Path) -> list[str]:
    """Names the operators of a file that are not of the ONNX standard, each once."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    return sorted({f"{node.domain}::{node.op_type}" for node in graph.node if node.domain not in ("", "ai.onnx")})


def time_in_turns(paths: Mapping[str, Path], batches: Sequence[Mapping[str, np.ndarray]]) -> dict[str, float]:
    """Measures how long each file takes for all batches, in turns in one run, on all cores.

    Args:
        paths: Files by name.
        batches: What they are fed.

    Returns:
        Median of the rounds in milliseconds, by name.
    """
    sessions = {name: onnx_session(path) for name, path in paths.items()}
    found: dict[str, list[float]] = {name: [] for name in paths}
    start = time.perf_counter()
    rounds = -1  # the first one only warms up
    while rounds < MIN_ROUNDS or time.perf_counter() - start < MIN_SECONDS:
        for name, session in sessions.items():
            begun = time.perf_counter()
            for batch in batches:
                session.run(None, batch)
            if rounds >= 0:
                found[name].append(time.perf_counter() - begun)
        rounds += 1
    return {name: 1e3 * statistics.median(seconds) for name, seconds in found.items()}


def write_int8(source: Path, target: Path, portable: bool = False) -> None:
    """Quantises the products of `source` dynamically: int8 weights per channel, uint8 activations per tensor.

    Args:
        source: A float32 file.
        target: Where to.
        portable: Use only standard operators. Else bias and GELU become one operator of ONNX Runtime.
    """
    import onnx
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.quant_utils import add_pre_process_metadata

    optimized = source.with_suffix(".optimized.onnx")
    options = onnxruntime.SessionOptions()
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_BASIC if portable else levels.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(optimized)
    onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    model = onnx.load(optimized)
    optimized.unlink()
    add_pre_process_metadata(model)  # it is; without this word the quantiser warns that it is not
    quantize_dynamic(model, target, op_types_to_quantize=["MatMul"], weight_type=QuantType.QInt8, per_channel=True)
