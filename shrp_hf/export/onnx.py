"""`export_model`: trace, write, reopen, compare, publish."""

import copy
import importlib.metadata
import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoImageProcessor, PreTrainedModel

from shrp_hf.checkpoints import open_config, open_model, open_tokenizer
from shrp_hf.defaults import MIN_AGREEMENT
from shrp_hf.export.check import (
    Arrays,
    agreement,
    difference,
    first_texts,
    input_names,
    is_multiple_choice,
    make_batches,
    of_real_tokens,
    onnx_outputs,
    torch_outputs,
)
from shrp_hf.export.embeddings import with_small_embeddings
from shrp_hf.export.graph import OUTPUTS, Form, write_graph
from shrp_hf.export.openvino import RECORD, check_openvino, openvino_session, write_openvino
from shrp_hf.export.options import ExportOptions, ExportRows, Text
from shrp_hf.export.runtime import EXTRA, onnx_session, own_operators, time_in_turns, write_int8
from shrp_hf.export.sentences import SENTENCES
from shrp_hf.families import head_layout
from shrp_hf.files import remove_staged, writing_to
from shrp_hf.models.outputs import with_vectors
from shrp_hf.models.rebuilding import check_plain
from shrp_hf.numerics import rounding_bound

TOLERANCE = rounding_bound(1.0, torch.float32)  # of the scale
CLEARLY_FASTER = 0.97  # of the time: less is within what two measurements differ
MOST_CALIBRATION = 300  # rows; NNCF's own default
MIN_TORCH = (2, 11)
MAX_BYTES = 2**31 - 2**24  # what one file of the format can hold, less the graph itself
PACKAGES = ("shrp_hf", "torch", "transformers", "onnx", "onnxscript", "onnxruntime")
RUNTIME_NAMES = {"onnx": "onnxruntime", "openvino": "openvino"}


def export_onnx(
    model: PreTrainedModel,
    tokenizer: Any,
    output: str | Path,
    *,
    int8: bool = False,
    texts: Sequence[Text] | None = None,
    min_agreement: float = MIN_AGREEMENT,
) -> Path:
    """Writes `model.onnx` in float32 or int8: `export_model` with its defaults.

    Args:
        model: See `export_model`.
        tokenizer: See `export_model`.
        output: See `export_model`.
        int8: Quantise dynamically: weights to int8 per channel, activations to uint8 per tensor.
        texts: Sentences, or pairs of them, to compare on; None takes two dozen that are built in.
        min_agreement: Least share of predictions that an int8 file must share with PyTorch, 0 to 1.

    Returns:
        Path of `model.onnx`.

    Raises:
        ImportError, ValueError, RuntimeError: As `export_model`.
    """
    options = ExportOptions(precision="int8" if int8 else "float32", min_agreement=min_agreement)
    return export_model(model, tokenizer, output, options, ExportRows(texts))


def export_model(
    model: PreTrainedModel,
    tokenizer: Any,
    output: str | Path,
    options: ExportOptions | None = None,
    rows: ExportRows | None = None,
) -> Path:
    """Writes a file for ONNX Runtime or OpenVINO, with config and tokenizer, after comparing it with PyTorch.

    Batch and length (and the number of choices) are free. The file is reopened in its runtime and run on padded batches and
    single sentences (images: random pixels): in float32 no output may differ from PyTorch's in float64 by more than float32
    may round: 1.2e-4 of the largest value of its name (at least 1). Of a file that rounds further the predictions must agree
    instead, after its float32 form has passed, and it may not lose more than 0.3 points on labelled rows unless chance can
    explain it. What was reached stands in `onnx.json` or `openvino.json`.

    Args:
        model: A stock or Shrp model of a supported family, pruned or not; left as it is.
        tokenizer: Its tokenizer (or image processor), saved beside the file; it decides whether the file asks for
            `token_type_ids`. None saves none, and compares on random tokens.
        output: Directory for the files; nothing in it is touched before they have passed.
        options: What kind of file; None: ONNX in float32, of the graph that is faster here.
        rows: What it is compared, judged and calibrated on; None: two dozen built-in sentences.

    Returns:
        Path of `model.onnx` or `model.xml`.

    Raises:
        ImportError: The extra `onnx` or `openvino` is not installed, or torch is older than 2.11.
        ValueError: An argument is wrong, or the model is of another family, wrapped, unfinished, or too large for one file.
        RuntimeError: The file does not say what PyTorch says.
    """
    options, rows, output = options or ExportOptions(), rows or ExportRows(), Path(output)
    _check_environment(options)
    _check_rows(model, tokenizer, options, rows)
    _check_output(output)
    names = output_names(model)
    _check_size(model)
    texts = rows.texts or SENTENCES
    batches = make_batches(model, tokenizer, texts)
    expected = torch_outputs(model, names, batches)
    traced, exact = _traced_form(model, options, expected, batches)
    record: dict[str, Any] = {
        "model": type(model).__name__,
        "format": options.format,
        "precision": options.precision,
        "embeddings": options.embeddings or ("float32" if options.format == "onnx" else options.precision.split("-")[0]),
        "inputs": input_names(model, tokenizer),
        "outputs": names,
        "opset": options.portable_opset,
        "compared_on": _compared_on(model, tokenizer, rows.texts),
        "versions": {name: importlib.metadata.version(name) for name in _packages(options)},
    }
    calibration = make_batches(model, tokenizer, rows.calibration[:MOST_CALIBRATION])[:-2] if rows.calibration else []
    with writing_to(output):
        output.mkdir(parents=True, exist_ok=True)
        remove_staged(output, ".exporting-*")
        with tempfile.TemporaryDirectory(dir=output, prefix=".exporting-") as folder:
            writer = _Writer(options, Path(folder), traced, record, batches, exact)
            path = writer.write_openvino(calibration) if options.format == "openvino" else writer.write_onnx()
            if not options.is_exact:
                found = _run(path, names, batches, options)
                record["agreement"] = _check_agreement(agreement(model, batches, expected, found), options)
                _check_quality(record, options, rows, (first_texts(x, len(texts)) for x in (expected, found)))
            _publish(model, tokenizer, record, path.parent, output)
    return output / path.name


@dataclass
class _Writer:
    """Writes the graphs of one export into a folder of its own, and says in the record what they are."""

    options: ExportOptions
    folder: Path
    model: PreTrainedModel
    record: dict[str, Any]
    batches: Sequence[Arrays]
    exact: Sequence[Arrays]

    def __post_init__(self) -> None:
        self.work, self.whole = self.folder / "work", self.folder / "whole"
        self.work.mkdir()
        self.whole.mkdir()

    def write_onnx(self) -> Path:
        """Writes the graphs that were asked for, and keeps the faster."""
        graph, is_int8 = self.options.graph, self.options.is_int8
        sources: dict[str, Path] = {}
        for operators in ("fused", "portable") if graph == "fastest" else (graph,):
            is_same = "fused" in sources and not own_operators(sources["fused"])
            sources[operators] = sources["fused"] if is_same else self._traced(operators)
        if not is_int8 and len(set(sources.values())) < len(sources):
            del sources["fused"]  # of a family without fused operators
        paths = sources
        if is_int8:
            paths = {operators: self.work / f"{operators}-int8.onnx" for operators in sources}
            for operators, path in paths.items():
                write_int8(sources[operators], path, portable=operators == "portable")
        times = time_in_turns(paths, [self.batches[0], *self.batches[-2:]]) if len(paths) > 1 else {}
        kept = next(iter(paths))
        if times and times["portable"] < CLEARLY_FASTER * times["fused"]:
            kept = "portable"
        self.record["graph"] = {"kept": kept, "asked": graph, "milliseconds": times}
        self.record["own_operators"] = own_operators(paths[kept])
        return paths[kept].replace(self.whole / "model.onnx")

    def write_openvino(self, calibration: Sequence[Arrays]) -> Path:
        """Writes `model.xml` and `model.bin` from the portable graph."""
        portable, path = self.work / "portable.onnx", self.whole / "model.xml"
        write_graph(self.model, self._inputs, self.record["outputs"], portable, Form("portable"))
        exact = ExportOptions("openvino")
        write_openvino(portable, self.work / "float32.xml", "float32")
        self.record["float32"] = _check_float32(self.model, self.work / "float32.xml", self.exact, self.batches, exact)
        (self.whole / RECORD).write_text(json.dumps({"precision": self.options.precision}))  # says how it is opened
        write_openvino(portable, path, self.options.precision, calibration)
        if calibration:
            self.record["calibrated_on"] = f"{sum(len(next(iter(batch.values()))) for batch in calibration)} texts"
        return path

    @property
    def _inputs(self) -> dict[str, torch.Tensor]:
        return tracing_inputs(self.model, self.record["inputs"])

    def _traced(self, operators: str) -> Path:
        """Writes a float32 graph, and compares it."""
        path = self.work / f"{operators}.onnx"
        is_portable = operators == "portable"
        opset = {"opset": self.options.portable_opset} if is_portable else {}
        form = Form(operators, split=self.options.is_int8 and not is_portable, **opset)
        write_graph(self.model, self._inputs, self.record["outputs"], path, form)
        found = _check_float32(self.model, path, self.exact, self.batches, ExportOptions())
        before = self.record.setdefault("float32", found)
        before["largest_difference"] = max(before["largest_difference"], found["largest_difference"])
        return path


def load_for_export(name: str) -> tuple[PreTrainedModel, Any]:
    """Opens a model with the task head that it was saved with, and its tokenizer or image processor.

    A base model whose files hold no pooler is opened without one.

    Args:
        name: Hub id or directory.

    Raises:
        ValueError: The config does not name a class that Transformers can load, the head was never trained, there is no
            tokenizer beside it that suits, or see `open_model`.
    """
    config = open_config(name)
    architecture = next(iter(getattr(config, "architectures", None) or [""]))
    head = architecture.partition("For")[2]
    auto = getattr(transformers, f"AutoModelFor{head}" if head else "AutoModel", None)
    if auto is None or not architecture:
        raise ValueError(f"`{name}` names the class {architecture!r} in its config, for which there is no Auto class.")
    reads_images = head == "ImageClassification" or "vit" in config.model_type
    model, untrained = open_model(name, auto)
    if not head and untrained and all(key.startswith("pooler.") for key in untrained):
        model.pooler, untrained = None, []
    if untrained:
        raise ValueError(
            f"`{name}` has no trained head ({untrained[0]} is missing), and would answer at random: fine-tune it first, or "
            "save the base model alone (`model.base_model.save_pretrained`)."
        )
    if not reads_images:
        return model, open_tokenizer(name, model)
    try:
        return model, AutoImageProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`{name}` holds no image processor that loads: save the model's own into it by `save_pretrained`."
        ) from error


def _check_environment(options: ExportOptions) -> None:
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < MIN_TORCH:
        raise ImportError(f"torch {torch.__version__} is too old for torch.onnx's dynamo exporter: pip install 'torch>=2.11'")
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(EXTRA) from error
    if options.format == "openvino":
        check_openvino()


def _packages(options: ExportOptions) -> tuple[str, ...]:
    return (*PACKAGES, "openvino", "nncf") if options.format == "openvino" else PACKAGES


def _check_rows(model: PreTrainedModel, tokenizer: Any, options: ExportOptions, rows: ExportRows) -> None:
    for name in ("texts", "calibration"):
        if getattr(rows, name) is not None and (tokenizer is None or model.main_input_name == "pixel_values"):
            raise ValueError(
                f"`{name}` need a text model and its `tokenizer`: leave them out, random inputs are compared then."
            )
    if (options.precision == "int8-static") != (rows.calibration is not None):
        raise ValueError(
            "`calibration` and `precision='int8-static'` go together: static int8 finds its scales on texts of the task, and "
            f"nothing else does. Got {options.precision!r} and {len(rows.calibration or [])} texts."
        )


def _traced_form(
    model: PreTrainedModel, options: ExportOptions, expected: Sequence[Arrays], batches: Sequence[Arrays]
) -> tuple[PreTrainedModel, Sequence[Arrays]]:
    """Returns what is traced, in float32 on the CPU, and what it must say: outputs with embeddings that are rounded alike."""
    if options.embeddings in (None, "float32") or (options.format == "openvino" and options.is_int8):
        return copy.deepcopy(model).to("cpu", torch.float32).eval(), expected
    small, rounded = with_small_embeddings(model, options.embeddings)
    return small, torch_outputs(rounded, list(expected[0]), batches)


def _compared_on(model: PreTrainedModel, tokenizer: Any, texts: Sequence[Text] | None) -> str:
    if model.main_input_name == "pixel_values":
        return "random pixels"
    if tokenizer is None:
        return "random tokens"
    return f"{len(SENTENCES)} built-in sentences" if texts is None else f"{len(texts)} texts that were given"


def _check_output(output: Path) -> None:
    if output.exists() and not output.is_dir():
        raise ValueError(f"`output` must be a directory, got the file {str(output)!r}.")
    weights = sorted(path.name for path in output.glob("*.safetensors"))
    if weights:
        raise ValueError(
            f"`output` {str(output)!r} holds a PyTorch model ({weights[0]}), whose config would be overwritten: "
            "give a directory of its own, for example a folder `onnx` in it."
        )


def _check_size(model: PreTrainedModel) -> None:
    size = 4 * sum(parameter.numel() for parameter in model.parameters())
    if size > MAX_BYTES:
        raise ValueError(f"`model` has {size / 1e9:.1f} GB of float32 weights, and one ONNX file holds 2 GB: prune it first.")


def output_names(model: PreTrainedModel) -> list[str]:
    """Reads from a tiny run which of the known outputs this model has."""
    layout = head_layout(model)  # refuses other families by name
    check_plain({i: layout.layers[i] for i in layout.ordinary_layers}, layout.layer_map)
    pending = getattr(model.config, "pending_layers", None)
    if pending:
        raise ValueError(f"Layers {pending} are still pending: finish the training, or call `finish_conversion_()`.")
    inputs = tracing_inputs(model, input_names(model))
    with torch.inference_mode():
        inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
        output = with_vectors(model, model(**inputs, return_dict=True), inputs.get("attention_mask"))
    names = [name for name in OUTPUTS if output.get(name) is not None]
    if not names:
        raise ValueError(f"`{type(model).__name__}` returns {list(output)}, none of which can be exported: {OUTPUTS}.")
    return names


def tracing_inputs(model: PreTrainedModel, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """A batch in which no dimension is 1, for which torch would fix it."""
    if names == ["pixel_values"]:
        size = model.config.image_size
        size = (size, size) if isinstance(size, int) else size
        return {"pixel_values": torch.zeros(2, model.config.num_channels, *size, dtype=model.dtype)}
    shape = (2, 3, 5) if is_multiple_choice(model) else (2, 5)
    filled = {"input_ids": 3, "attention_mask": 1, "token_type_ids": 0}
    return {name: torch.full(shape, filled[name]) for name in names}


def _run(path: Path, names: Sequence[str], batches: Sequence[Arrays], options: ExportOptions) -> list[Arrays]:
    session = openvino_session(path) if options.format == "openvino" else onnx_session(path)
    return [onnx_outputs(session, names, batch) for batch in batches]


def _check_float32(
    model: PreTrainedModel, path: Path, expected: Sequence[Arrays], batches: Sequence[Arrays], options: ExportOptions
) -> dict[str, float]:
    found = _run(path, list(expected[0]), batches, options)
    reached = difference(*(of_real_tokens(model, batches, each) for each in (expected, found)))
    if not reached <= TOLERANCE:
        raise RuntimeError(
            f"The {options.format} file differs from PyTorch by {reached:.2g} of the largest output, more than "
            f"{TOLERANCE:.1e}: nothing was published. Weights that are not finite, or a release of "
            f"{RUNTIME_NAMES[options.format]} that was not tested, may cause this."
        )
    return {"largest_difference": reached, "tolerance": TOLERANCE}


def _check_agreement(measured: tuple[str, float], options: ExportOptions) -> dict[str, Any]:
    (measure, reached), least = measured, options.min_agreement
    if math.isnan(reached) and not options.force:
        raise RuntimeError(
            f"The agreement of the {options.precision} file ({measure}) is undefined: the model predicts one number for all "
            "that it was compared on. Compare on sentences of your task (`texts`)."
        )
    if not reached >= least and not options.force:
        raise RuntimeError(
            f"The {options.precision} file agrees with PyTorch on {reached:.3f} ({measure}), less than "
            f"`min_agreement={least}`: nothing was published. Compare on sentences of your task (`texts`), lower "
            "`min_agreement`, or export in float32."
        )
    return {"measure": measure, "agreement": None if math.isnan(reached) else reached, "min_agreement": least}


def _check_quality(record: dict[str, Any], options: ExportOptions, rows: ExportRows, logits: Any) -> None:
    if rows.judge is None:
        return
    loss = rows.judge(*logits)
    record["quality"] = {**asdict(loss), "forced": loss.is_real and options.force}
    if loss.is_real and not options.force:
        low, high = (100 * bound for bound in loss.interval)
        raise RuntimeError(
            f"The {options.precision} file loses {100 * (loss.model - loss.file):.2f} points of {loss.metric} on {loss.rows} "
            f"held-out rows (95% interval {low:.2f} to {high:.2f}): nothing was published. Export in another precision, or "
            "`force` it."
        )


def _publish(model: PreTrainedModel, tokenizer: Any, record: dict, staged: Path, output: Path) -> None:
    """Moves everything where it belongs, the file itself last."""
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.save_pretrained(staged)
    if "Classification" in type(model).__name__:
        # Transformers leaves out names like LABEL_0, and a server without it could not make them up.
        path = staged / "config.json"
        labels = {str(label): name for label, name in config.id2label.items()}
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {"id2label": labels}, indent=2) + "\n")
    if tokenizer is not None:
        tokenizer.save_pretrained(staged)
    (staged / f"{record['format']}.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if record["format"] == "openvino":
        (output / "model.xml").unlink(missing_ok=True)  # an old graph would read the new weights
    for path in sorted(staged.iterdir(), key=lambda path: path.name in ("model.onnx", "model.xml")):
        path.replace(output / path.name)
