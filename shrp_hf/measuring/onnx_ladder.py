"""The ladder in ONNX Runtime: its graph is cut where one layer ends and the next begins, a session for each part."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from shrp_hf.export.check import input_names
from shrp_hf.export.graph import Form, write_graph
from shrp_hf.export.onnx import output_names, tracing_inputs
from shrp_hf.export.runtime import EXTRA, onnx_session, write_int8
from shrp_hf.measuring.ladder import Clock


@dataclass
class Part:
    """A stretch of the graph: its nodes, and the names of what goes in and comes out."""

    nodes: list[Any] = field(default_factory=list)
    weights: list[Any] = field(default_factory=list)
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    session: Any = None


def time_onnx(
    ladder: PreTrainedModel, inputs: Mapping[str, torch.Tensor], folder: Path, num_threads: int, int8: bool = False
) -> Clock:
    """Returns a call that runs the ladder in ONNX Runtime, in the form in which `export_onnx` writes a model.

    Args:
        ladder: From `build_ladder`.
        inputs: The batch, without padding.
        folder: Where the files go while the call is in use.
        num_threads: Threads within an operator.
        int8: Quantise dynamically.

    Raises:
        ImportError: The extra `onnx` is not installed.
    """
    parts, feeds = open_parts(ladder, inputs, folder, num_threads, int8)

    def call() -> list[float]:
        known = dict(feeds)
        return [run_part(part, known) for part in parts]

    return call


def open_parts(
    ladder: PreTrainedModel, inputs: Mapping[str, torch.Tensor], folder: Path, num_threads: int, int8: bool
) -> tuple[list[Part], dict[str, np.ndarray]]:
    """Opens the ladder part by part; the arguments are those of `time_onnx`.

    Returns:
        What comes before the layers, each layer, and what comes after; and what the first of them is given.
    """
    try:
        import onnx
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(EXTRA) from error
    asked, names = input_names(ladder), output_names(ladder)
    path = folder / "ladder.onnx"
    write_graph(ladder, tracing_inputs(ladder, asked), names, path, Form(split=int8), with_hidden_states=True)
    if int8:
        write_int8(path, folder / "int8.onnx")
        path = folder / "int8.onnx"
    model = onnx.load(path)
    ones = torch.ones_like(next(iter(inputs.values())))
    given = {"attention_mask": ones, "token_type_ids": torch.zeros_like(ones), **inputs}
    feeds = {name: given[name].numpy() for name in asked}
    parts = _parts(model.graph, num_outputs=len(names))
    known = dict(feeds)
    for number, part in enumerate(parts):
        _open(part, model, known, folder / f"part{number}.onnx", num_threads)
        run_part(part, known)
    return parts, feeds


def run_part(part: Part, known: dict[str, np.ndarray]) -> float:
    """Runs a part on what is known, adds what it makes to it, and returns the seconds."""
    if part.session is None:
        return 0.0
    given = {name: known[name] for name in part.inputs}
    start = time.perf_counter()
    found = part.session.run(part.outputs, given)
    seconds = time.perf_counter() - start
    known.update(zip(part.outputs, found, strict=True))
    return seconds


def _parts(graph: Any, num_outputs: int) -> list[Part]:
    """Cuts a graph at the hidden states: a node belongs to the first part in which all that it reads is there.

    What no hidden state goes into (masks, position biases) so belongs to what comes before the layers, and is handed on.

    Args:
        graph: Its outputs are those of the model, then the hidden states in order.
        num_outputs: How many outputs the model has.
    """
    outputs = [value.name for value in graph.output]
    copies = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "Identity"}
    ends = [copies.get(name, name) for name in outputs[num_outputs:]]
    weights = {tensor.name: tensor for tensor in graph.initializer}
    there = dict.fromkeys([*weights, *(value.name for value in graph.input)], 0)  # tensor -> the part that first has it
    parts = [Part() for _ in range(len(ends) + 1)]
    for node in graph.node:
        number = max((there[name] for name in node.input if name), default=0)
        parts[number].nodes.append(node)
        there.update({name: ends.index(name) + 1 if name in ends else number for name in node.output})
    read_later: set[str] = set(outputs[:num_outputs])
    for part in reversed(parts):
        made = {name for node in part.nodes for name in node.output}
        read = {name for node in part.nodes for name in node.input if name} - made
        part.weights = [weights[name] for name in sorted(read & set(weights))]
        part.inputs = sorted(read - set(weights))
        part.outputs = sorted(made & read_later)
        read_later |= read
    return parts


def _open(part: Part, model: Any, known: Mapping[str, np.ndarray], path: Path, num_threads: int) -> None:
    """Opens a part in a session of its own. Inputs are of the type that the model says, or that they were found to be."""
    import onnx

    if not part.nodes:  # of a base model nothing comes after the last layer
        return
    described = {value.name: value for value in [*model.graph.value_info, *model.graph.input, *model.graph.output]}
    kinds = {name: onnx.helper.np_dtype_to_tensor_dtype(known[name].dtype) for name in part.inputs}
    inputs = [
        described.get(name) or onnx.helper.make_tensor_value_info(name, kinds[name], known[name].shape) for name in part.inputs
    ]
    outputs = [onnx.ValueInfoProto(name=name) for name in part.outputs]  # ONNX Runtime finds out their types
    graph = onnx.helper.make_graph(part.nodes, path.stem, inputs, outputs, part.weights)
    onnx.save(onnx.helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version), path)
    part.session = onnx_session(path, num_threads)
