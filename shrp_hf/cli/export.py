"""`shrp-hf export`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from shrp_hf.cli.app import ModelArgument, OutputOption, app, console


@app.command()
def export(
    model: ModelArgument,
    output: OutputOption,
    format: Annotated[str, typer.Option(help="onnx, for ONNX Runtime.")] = "onnx",
    int8: Annotated[bool, typer.Option("--int8", help="Quantise the matrix products to 8 bits.")] = False,
    texts: Annotated[Path | None, typer.Option(help="File of sentences, one a line, to compare on.")] = None,
    min_agreement: Annotated[float, typer.Option(help="int8: least agreement with the model, 0 to 1.")] = 0.9,
) -> None:
    """Writes a model for ONNX Runtime, compared with the model before it is published.

    OUTPUT then holds `model.onnx`, the tokenizer, `config.json` and `onnx.json` with what the comparison found. Where the
    file differs by more than 1e-5 (int8: agrees less than asked for), nothing is written.

    Example: `shrp-hf export out/demo/static --format onnx --int8 --output out/onnx`
    """
    from shrp_hf.onnx_export import export_onnx, load_for_export
    from shrp_hf.onnx_export.parity import SENTENCES

    if format != "onnx":
        raise ValueError(f'`format` must be "onnx", got {format!r}.')
    sentences: tuple[str, ...] = SENTENCES
    if texts is not None:
        sentences = tuple(line for line in texts.read_text(encoding="utf-8").splitlines() if line.strip())
    loaded, processor = load_for_export(model)
    path = export_onnx(loaded, processor, output, int8=int8, sentences=sentences, min_agreement=min_agreement)
    record = json.loads((output / "onnx.json").read_text(encoding="utf-8"))
    console.print(
        f"Written: {path} ({path.stat().st_size / 1e6:.1f} MB). Largest difference {record['difference']:.1e} of the largest "
        f"output; equal decisions {record['agreement_of_decisions']:.3f}, cosine {record['cosine']:.4f}.",
        soft_wrap=True,
    )
