"""`export_onnx`: trace, optimise, quantise if asked to, open again, compare, publish."""

import inspect
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers import __version__ as transformers_version

from shrp_hf.onnx_export.fusing import fused
from shrp_hf.onnx_export.parity import SENTENCES, Comparison, output_names, sample_batches

OPSET = 20
MIN_TORCH = "2.11"
TOLERANCE = 1e-5
MAX_BYTES = 2**31 - 2**24  # what one file of the format can hold, less the graph itself

_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "pixel_values")


def export_onnx(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    output: str | Path,
    *,
    int8: bool = False,
    sentences: Sequence[str] = SENTENCES,
    min_agreement: float = 0.9,
) -> Path:
    """Writes `model.onnx` for ONNX Runtime, after comparing it with the model; batch and length stay free.

    The file is float32, or int8 weights with activations quantised as they come. It uses operators of ONNX Runtime
    (fused attention), so other runtimes cannot read it.

    Args:
        model: A model of a supported family, with any task head, dense, head-pruned, routed or static.
        tokenizer: Saved beside the file; its inputs are the file's. None: all inputs that the model reads.
        output: Directory for `model.onnx`, `config.json`, the tokenizer and `onnx.json`, the record of the comparison.
        int8: Quantise the matrix products.
        sentences: What to compare on, and to measure agreement on.
        min_agreement: int8: least share of equal decisions (of logits), or mean cosine (of other outputs), 0 to 1.

    Returns:
        Path of `model.onnx`.

    Raises:
        ImportError: The extra `onnx` is not installed, or torch is too old.
        ValueError: An argument does not fit, the model is too large for one file, or the file differs from the model: by
            more than 1e-5 of the largest output in float32, or with less agreement than `min_agreement` in int8.
            Nothing is published then.
    """
    _check_installed()
    if not 0 <= min_agreement <= 1:
        raise ValueError(f"`min_agreement` must be between 0 and 1, got {min_agreement}.")
    if not sentences:
        raise ValueError("`sentences` must hold at least one sentence, got none.")
    size = 4 * sum(p.numel() for p in model.parameters())
    if size > MAX_BYTES:
        raise ValueError(f"`model` has {size / 1e9:.1f} GB of float32 weights, and one ONNX file holds 2 GB: prune it first.")
    model = model.to("cpu")
    batches = [_readable(model, tokenizer, batch) for batch in sample_batches(model, tokenizer, sentences)]
    with torch.inference_mode():
        expected = [model.float().eval()(**batch) for batch in batches]
    names = output_names(expected[0])
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output, prefix=".exporting-") as staged:
        path = Path(staged) / "model.onnx"
        _trace(model, batches[0], names, path)
        _optimise(path)
        if int8:
            _quantise(path)
        record = _compare(path, batches, [[out[name].numpy() for name in names] for out in expected], int8)
        _refuse(record, model, int8, min_agreement)
        model.config.save_pretrained(staged)
        if tokenizer is not None:
            tokenizer.save_pretrained(staged)
        details = {"inputs": list(batches[0]), "outputs": names, "sentences": 0 if tokenizer is None else len(sentences)}
        (Path(staged) / "onnx.json").write_text(json.dumps(record | details, indent=2) + "\n", encoding="utf-8")
        for file in sorted(Path(staged).iterdir(), key=lambda file: file.name == "onnx.json"):
            file.replace(output / file.name)
    return output / "model.onnx"


def onnx_session(path: str | Path, num_threads: int | None = None) -> Any:
    """Opens an exported file on the CPU.

    Args:
        path: The file.
        num_threads: Threads within an operator; None: ONNX Runtime's choice.

    Returns:
        An `onnxruntime.InferenceSession`: `session.run(None, {name: array})`.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    if num_threads is not None:
        options.intra_op_num_threads = num_threads
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


class _Traced(nn.Module):
    """The model as a function of tensors in a fixed order, to tensors in a fixed order."""

    def __init__(self, model: PreTrainedModel, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.inputs = inputs
        self.outputs = outputs

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outputs = self.model(**dict(zip(self.inputs, tensors, strict=True)))
        return tuple(outputs[name] for name in self.outputs)


def _check_installed() -> None:
    if Version(torch.__version__) < Version(MIN_TORCH):
        raise ImportError(f"Export needs torch {MIN_TORCH} or newer, and this is torch {torch.__version__}: upgrade torch.")
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError("Export needs onnx, onnxruntime and onnxscript: pip install 'shrp_hf[onnx]'") from error


def _readable(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, batch: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Leaves only what the model reads, in a fixed order."""
    accepted = inspect.signature(model.forward).parameters
    reads = set(accepted) if "kwargs" not in accepted else {*accepted, *_INPUTS}
    if getattr(model.config, "model_type", "").endswith("distilbert"):
        reads.discard("token_type_ids")
    return {name: batch[name] for name in _INPUTS if name in batch and name in reads}


def _trace(model: PreTrainedModel, batch: dict[str, torch.Tensor], names: Sequence[str], path: Path) -> None:
    batch_axis = torch.export.Dim("batch")
    longest = getattr(model.config, "max_position_embeddings", None)
    length_axis = torch.export.Dim("length", max=longest)
    shapes = [
        {0: batch_axis} | ({} if name == "pixel_values" else {tensor.dim() - 1: length_axis}) for name, tensor in batch.items()
    ]
    program = torch.onnx.export(
        _Traced(fused(model), list(batch), names),
        tuple(batch.values()),
        dynamo=True,
        input_names=list(batch),
        output_names=list(names),
        dynamic_shapes=(tuple(shapes),),
        opset_version=OPSET,
        verbose=False,
    )
    program.save(path)


def _optimise(path: Path) -> None:
    """Lets ONNX Runtime fuse what it knows (GELU with its bias, LayerNorm with its sum) and keeps the result."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(path.with_suffix(".optimised"))
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    path.with_suffix(".optimised").replace(path)


def _quantise(path: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantised = path.with_suffix(".int8")
    quantize_dynamic(path, quantised, weight_type=QuantType.QInt8, op_types_to_quantize=["MatMul", "Attention"])
    quantised.replace(path)


def _compare(
    path: Path, batches: Sequence[dict[str, torch.Tensor]], expected: Sequence[Sequence[Any]], int8: bool
) -> dict[str, Any]:
    import onnx
    import onnxruntime

    session = onnx_session(path)
    found = [session.run(None, {name: tensor.numpy() for name, tensor in batch.items()}) for batch in batches]
    masks = [batch["attention_mask"].numpy() if "attention_mask" in batch else None for batch in batches]
    comparison = Comparison(expected, found, masks)
    return {
        "format_version": 1,
        "int8": int8,
        "opset": OPSET,
        "difference": comparison.difference,
        "tolerance": None if int8 else TOLERANCE,
        "agreement_of_decisions": comparison.agreement(decides=True),
        "cosine": comparison.agreement(decides=False),
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers_version,
            "onnx": onnx.__version__,
            "onnxruntime": onnxruntime.__version__,
        },
    }


def _refuse(record: dict[str, Any], model: PreTrainedModel, int8: bool, min_agreement: float) -> None:
    if not int8:
        if record["difference"] > TOLERANCE:
            raise ValueError(
                f"The exported file differs from `model` by {record['difference']:.1e} of its largest output, more than "
                f"{TOLERANCE:.0e}: nothing was written. Upgrade torch and onnxruntime, and report it if that does not help."
            )
        return
    decides = not type(model).__name__.endswith("Model") and getattr(model.config, "num_labels", 2) > 1
    name = "agreement_of_decisions" if decides else "cosine"
    if not record[name] >= min_agreement:
        what = "equal decisions" if decides else "cosine"
        raise ValueError(
            f"In int8 the file agrees with `model` in {record[name]:.3f} ({what}), less than `min_agreement={min_agreement}`: "
            "nothing was written. Export without int8, or lower `min_agreement` if your own test set allows it."
        )
