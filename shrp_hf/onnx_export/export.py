"""`export_onnx`: trace, write, reopen, compare, publish."""

import copy
import importlib.metadata
import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoImageProcessor, PreTrainedModel

from shrp_hf.checkpoints import open_config, open_model, open_tokenizer
from shrp_hf.families import head_layout
from shrp_hf.files import remove_staged, writing_to
from shrp_hf.models.rebuilding import check_plain
from shrp_hf.numerics import rounding_bound
from shrp_hf.onnx_export.check import (
    Arrays,
    Text,
    agreement,
    difference,
    input_names,
    is_multiple_choice,
    make_batches,
    onnx_outputs,
    torch_outputs,
)
from shrp_hf.onnx_export.graph import OPSET, OUTPUTS, write_graph
from shrp_hf.onnx_export.runtime import EXTRA, onnx_session, write_int8
from shrp_hf.onnx_export.sentences import SENTENCES
from shrp_hf.outputs import with_vectors

TOLERANCE = rounding_bound(1.0, torch.float32)  # of the scale
MIN_AGREEMENT = 0.9
MIN_TORCH = (2, 11)
MAX_BYTES = 2**31 - 2**24  # what one file of the format can hold, less the graph itself
PACKAGES = ("shrp_hf", "torch", "transformers", "onnx", "onnxscript", "onnxruntime")


def export_onnx(
    model: PreTrainedModel,
    tokenizer: Any,
    output: str | Path,
    *,
    int8: bool = False,
    texts: Sequence[Text] | None = None,
    min_agreement: float = MIN_AGREEMENT,
) -> Path:
    """Writes `model.onnx` for ONNX Runtime, with config and tokenizer, after comparing it with PyTorch.

    Batch and length (and the number of choices) are free. The file is float32, and uses operators that only ONNX Runtime
    has. It is reopened there and run on padded batches and single sentences (images: random pixels): no output may
    differ from PyTorch's in float64 by more than float32 may round: 1.2e-4 of the largest value of its name (at least 1).
    Of an int8 file the predictions must agree instead, after its float32 form has passed. What was reached stands in
    `onnx.json`.

    Args:
        model: A stock or Shrp model of a supported family, pruned or not; left as it is.
        tokenizer: Its tokenizer (or image processor), saved beside the file; it decides whether the file asks for
            `token_type_ids`. None saves none, and compares on random tokens.
        output: Directory for the files; nothing in it is touched before they have passed.
        int8: Quantise dynamically: weights to int8 per channel, activations to uint8 per tensor.
        texts: Sentences, or pairs of them, to compare on; None takes two dozen that are built in.
        min_agreement: Least share of predictions that an int8 file must share with PyTorch, 0 to 1.

    Returns:
        Path of `model.onnx`.

    Raises:
        ImportError: The extra `onnx` is not installed, or torch is older than 2.11.
        ValueError: An argument is wrong, or the model is of another family, wrapped, unfinished, or too large for one file.
        RuntimeError: The file does not say what PyTorch says.
    """
    _check_environment()
    output, texts = Path(output), _checked_texts(model, tokenizer, texts)
    if not 0 <= min_agreement <= 1:
        raise ValueError(f"`min_agreement` must be a share from 0 to 1, got {min_agreement}.")
    _check_output(output)
    names = output_names(model)
    _check_size(model)
    batches = make_batches(model, tokenizer, texts or SENTENCES)
    expected = torch_outputs(model, names, batches)
    reference = copy.deepcopy(model).to("cpu", torch.float32).eval()
    record: dict[str, Any] = {
        "model": type(model).__name__,
        "precision": "int8" if int8 else "float32",
        "inputs": input_names(model, tokenizer),
        "outputs": names,
        "opset": OPSET,
        "compared_on": _compared_on(model, tokenizer, texts),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }
    with writing_to(output):
        output.mkdir(parents=True, exist_ok=True)
        remove_staged(output, ".exporting-*")
        with tempfile.TemporaryDirectory(dir=output, prefix=".exporting-") as folder:
            staged = Path(folder)
            path = staged / "model.onnx"
            write_graph(reference, tracing_inputs(reference, record["inputs"]), names, path, split=int8)
            record["float32"] = _check_float32(path, expected, batches)
            if int8:
                write_int8(path, staged / "int8.onnx")
                (staged / "int8.onnx").replace(path)
                found = _run(path, names, batches)
                record["int8"] = _check_int8(agreement(model, batches, expected, found), min_agreement)
            _publish(model, tokenizer, record, staged, output)
    return output / "model.onnx"


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


def _check_environment() -> None:
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < MIN_TORCH:
        raise ImportError(f"torch {torch.__version__} is too old for torch.onnx's dynamo exporter: pip install 'torch>=2.11'")
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(EXTRA) from error


def _checked_texts(model: PreTrainedModel, tokenizer: Any, texts: Sequence[Text] | None) -> list[Text] | None:
    if texts is None:
        return None
    if isinstance(texts, str) or not texts:
        raise ValueError(f"`texts` must be a list of sentences, at least one, got {texts!r}.")
    if tokenizer is None or model.main_input_name == "pixel_values":
        raise ValueError("`texts` need a text model and its `tokenizer`: leave them out, random inputs are compared then.")
    texts = [text if isinstance(text, str) else tuple(text) for text in texts]
    kinds = {1 if isinstance(text, str) else len(text) for text in texts}
    if kinds not in ({1}, {2}):
        raise ValueError(f"`texts` must all be sentences, or all pairs of sentences, got items of {sorted(kinds)} parts.")
    return texts


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


def _run(path: Path, names: Sequence[str], batches: Sequence[Arrays]) -> list[Arrays]:
    session = onnx_session(path)
    return [onnx_outputs(session, names, batch) for batch in batches]


def _check_float32(path: Path, expected: Sequence[Arrays], batches: Sequence[Arrays]) -> dict[str, float]:
    reached = difference(expected, _run(path, list(expected[0]), batches))
    if not reached <= TOLERANCE:
        raise RuntimeError(
            f"The ONNX file differs from PyTorch by {reached:.2g} of the largest output, more than {TOLERANCE:.1e}: nothing "
            "was published. Weights that are not finite, or a release of onnxruntime that was not tested, may cause this."
        )
    return {"largest_difference": reached, "tolerance": TOLERANCE}


def _check_int8(measured: tuple[str, float], least: float) -> dict[str, Any]:
    measure, reached = measured
    if math.isnan(reached):
        raise RuntimeError(
            f"The agreement of the int8 file ({measure}) is undefined: the model predicts one number for all that it was "
            "compared on. Compare on sentences of your task (`texts`)."
        )
    if not reached >= least:
        raise RuntimeError(
            f"The int8 file agrees with PyTorch on {reached:.3f} ({measure}), less than `min_agreement={least}`: nothing was "
            "published. Compare on sentences of your task (`texts`), lower `min_agreement`, or export without int8."
        )
    return {"measure": measure, "agreement": reached, "min_agreement": least}


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
    (staged / "onnx.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    for path in sorted(staged.iterdir(), key=lambda path: path.name == "model.onnx"):
        path.replace(output / path.name)
