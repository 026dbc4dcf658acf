"""OpenVINO: turning the portable ONNX graph into its own format, at four precisions, and opening what was written."""

import contextlib
import io
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

EXTRA_OPENVINO = "OpenVINO's files need openvino and nncf: pip install 'shrp_hf[openvino]'"
RECORD = "openvino.json"


class OpenVinoSession:
    """A model in OpenVINO, called as ONNX Runtime's sessions are.

    Args:
        compiled: An `openvino.CompiledModel`.
    """

    def __init__(self, compiled: Any) -> None:
        self.compiled = compiled
        self.request = compiled.create_infer_request()
        self.input_names = [port.get_any_name() for port in compiled.inputs]

    def run(self, names: Sequence[str] | None, feed: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Returns the outputs of these names, all of them for None; one call at a time."""
        found = self.request.infer(dict(feed), share_inputs=True)
        outputs = {name: found[port] for port in self.compiled.outputs for name in port.get_names()}
        names = [port.get_any_name() for port in self.compiled.outputs] if names is None else names
        return [np.array(outputs[name]) for name in names]


def openvino_session(path: str | Path, num_threads: int | None = None) -> OpenVinoSession:
    """Opens a file in OpenVINO on the CPU.

    A float32 file computes in float32; OpenVINO itself would take bfloat16 on processors that have it, as it does here with
    files that are rounded anyway.

    Args:
        path: A `model.xml`, a portable `model.onnx`, or the directory that `export_model` wrote one into.
        num_threads: Threads within an operator; None leaves OpenVINO's choice, all cores.

    Raises:
        ImportError: The extra `openvino` is not installed.
        ValueError: There is no such file, or `num_threads` is below 1.
    """
    path = Path(path)
    path = path / "model.xml" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"`path` must be a file of OpenVINO or a directory that holds `model.xml`, got {str(path)!r}.")
    if num_threads is not None and num_threads < 1:
        raise ValueError(f"`num_threads` must be at least 1, got {num_threads}.")
    check_openvino()
    import openvino

    options: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
    if num_threads:
        options["INFERENCE_NUM_THREADS"] = num_threads
    record = path.with_name(RECORD)
    precision = json.loads(record.read_text(encoding="utf-8"))["precision"] if record.exists() else "float32"
    if precision == "float32":
        options["INFERENCE_PRECISION_HINT"] = "f32"
    return OpenVinoSession(openvino.Core().compile_model(path, "CPU", options))


def check_openvino() -> None:
    """Refuses by the name of the extra where OpenVINO or NNCF is not installed."""
    try:
        import nncf  # noqa: F401
        import openvino  # noqa: F401
    except ImportError as error:
        raise ImportError(EXTRA_OPENVINO) from error


def write_openvino(portable: Path, target: Path, precision: str, calibration: Sequence[Mapping[str, np.ndarray]] = ()) -> None:
    """Turns a portable ONNX file into OpenVINO's format.

    Args:
        portable: The ONNX file, in float32.
        target: The `.xml` to write; the weights go into a `.bin` beside it.
        precision: "float32", "float16" (weights), "int8" (weights per channel, embeddings per row) or "int8-static"
            (activations too, by scales found on the calibration batches).
        calibration: Batches for static int8.
    """
    import nncf
    import openvino

    model = openvino.Core().read_model(portable)
    with _silent():
        if precision == "int8":
            model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM)
        elif precision == "int8-static":
            rows = nncf.Dataset([dict(batch) for batch in calibration])
            model = nncf.quantize(model, rows, subset_size=len(calibration), model_type=nncf.ModelType.TRANSFORMER)
    openvino.save_model(model, target, compress_to_fp16=precision == "float16")


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keeps NNCF's tables and bars off the terminal."""
    logger = logging.getLogger("nncf")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(before)
