"""ONNX Runtime: opening a file, and turning it into int8."""

from pathlib import Path
from typing import Any

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


def write_int8(source: Path, target: Path) -> None:
    """Quantises the products of `source` dynamically: int8 weights per channel, uint8 activations per tensor."""
    import onnx
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.quant_utils import add_pre_process_metadata

    optimized = source.with_suffix(".optimized.onnx")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(optimized)  # bias and GELU, residual and LayerNorm become one operator each
    onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    model = onnx.load(optimized)
    optimized.unlink()
    add_pre_process_metadata(model)  # it is; without this word the quantiser warns that it is not
    quantize_dynamic(model, target, op_types_to_quantize=["MatMul"], weight_type=QuantType.QInt8, per_channel=True)
