"""A model in a runtime: PyTorch, eager or compiled, ONNX Runtime and OpenVINO, each in float32 or int8."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from shrp_hf.export import ExportOptions, onnx_session, openvino_session
from shrp_hf.measuring.cost import peak_memory

EXPORTED = {
    "onnx": ExportOptions(min_agreement=0.0),
    "int8": ExportOptions(precision="int8", min_agreement=0.0),
    "openvino": ExportOptions("openvino", min_agreement=0.0),
    "openvino-int8": ExportOptions("openvino", "int8-static", min_agreement=0.0),
}
"""Runtimes that open a file, by what is in it."""
RUNTIMES = ("eager", "compiled", *EXPORTED)

Batch = Mapping[str, torch.Tensor]
Call = Callable[[], object]


class Runner(Protocol):
    """A model that is ready to serve."""

    weight_bytes: int
    device: torch.device

    def prepare(self, batches: Sequence[Batch]) -> Call:
        """Returns a call that works through the batches, whose inputs lie where it wants them already."""

    def activation_bytes(self, call: Call) -> int | None:
        """Most bytes that a prepared call holds beyond the weights; None where the runtime does not tell."""


class TorchRunner:
    """A model in PyTorch.

    Args:
        model: The model, on the device and in the dtype that it serves in.
        compiled: Through `torch.compile`, as one graph.
    """

    def __init__(self, model: PreTrainedModel, compiled: bool) -> None:
        self.model = model.eval()
        self.compiled = compiled
        self.device = model.device
        self.weight_bytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())

    def prepare(self, batches: Sequence[Batch]) -> Call:
        """Returns the call; with several shapes the compiled graph has a free batch and length."""
        moved = [{name: self._moved(value) for name, value in batch.items()} for batch in batches]
        forward: Callable[..., object] = self.model
        if self.compiled:
            forward = torch.compile(self.model, fullgraph=True, dynamic=len({_shape(batch) for batch in batches}) > 1)

        def call() -> None:
            for batch in moved:
                forward(**batch)

        return call

    def activation_bytes(self, call: Call) -> int:
        """From torch's own record of allocations."""
        return peak_memory(call, self.device)

    def _moved(self, value: torch.Tensor) -> torch.Tensor:
        return value.to(self.device, self.model.dtype if value.is_floating_point() else None)


class FileRunner:
    """A file in ONNX Runtime or OpenVINO, on the CPU.

    Args:
        path: The file.
        num_threads: Threads within an operator.
    """

    device = torch.device("cpu")

    def __init__(self, path: Path, num_threads: int) -> None:
        self.session: Any
        if path.suffix == ".xml":
            self.session = openvino_session(path, num_threads)
            self.names = self.session.input_names
            self.weight_bytes = path.with_suffix(".bin").stat().st_size
        else:
            self.session = onnx_session(path, num_threads)
            self.names = [node.name for node in self.session.get_inputs()]
            self.weight_bytes = path.stat().st_size

    def prepare(self, batches: Sequence[Batch]) -> Call:
        """Returns the call; a mask or token types that a batch lacks are those of a batch without padding."""
        arrays = [self._arrays(batch) for batch in batches]

        def call() -> None:
            for batch in arrays:
                self.session.run(None, batch)

        return call

    def activation_bytes(self, call: Call) -> None:  # noqa: ARG002
        """Neither of them tells."""
        return

    def _arrays(self, batch: Batch) -> dict[str, Any]:
        batch = dict(batch)
        if "input_ids" in batch:
            batch.setdefault("attention_mask", torch.ones_like(batch["input_ids"]))
            batch.setdefault("token_type_ids", torch.zeros_like(batch["input_ids"]))
        return {name: batch[name].numpy() for name in self.names}


def _shape(batch: Batch) -> tuple[int, ...]:
    return tuple(next(iter(batch.values())).shape)
