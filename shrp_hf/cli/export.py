"""`shrp-hf export`."""

import json
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from shrp_hf.cli.app import (
    CorpusOption,
    DataDirOption,
    LabelColumnOption,
    ModelArgument,
    OutputOption,
    SeedOption,
    TaskOption,
    TextColumnOption,
    TextPairColumnOption,
    app,
    console,
    read_task,
)
from shrp_hf.defaults import MIN_AGREEMENT, SEED


@app.command()
def export(
    model: ModelArgument,
    output: OutputOption,
    format: Annotated[Literal["onnx", "openvino"], typer.Option(help="The file's format.")] = "onnx",
    precision: Annotated[
        Literal["float32", "float16", "int8", "int8-static"],
        typer.Option(help="int8: int8 weights, activations quantised as they come. OpenVINO: also float16 and int8-static."),
    ] = "float32",
    int8: Annotated[bool, typer.Option("--int8", help="The same as --precision int8.")] = False,
    graph: Annotated[
        Literal["fastest", "fused", "portable"],
        typer.Option(help="ONNX: ONNX Runtime's own operators, standard ones alone, or what is faster on this machine."),
    ] = "fastest",
    opset: Annotated[int | None, typer.Option(help="ONNX, portable: version of the operators, 18 to 23; default: 20.")] = None,
    embeddings: Annotated[
        Literal["float32", "float16", "int8"] | None,
        typer.Option(help="How word embeddings are kept; default: float32 in ONNX, else as --precision says."),
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(help="Compare and judge on the held-out rows of this task, 512 at most.")
    ] = None,
    data_dir: DataDirOption = None,
    text_column: TextColumnOption = None,
    text_pair_column: TextPairColumnOption = None,
    label_column: LabelColumnOption = None,
    task: TaskOption = None,
    corpus: CorpusOption = None,
    texts: Annotated[Path | None, typer.Option(help="Compare on the lines of this text file.")] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="int8-static: text file to find scales on; default: training rows of --dataset.")
    ] = None,
    min_agreement: Annotated[
        float, typer.Option(help="Share of a rounded file's predictions that must be PyTorch's.")
    ] = MIN_AGREEMENT,
    force: Annotated[bool, typer.Option("--force", help="Write a file that agrees too little or loses quality.")] = False,
    seed: SeedOption = SEED,
) -> None:
    """Writes a model for ONNX Runtime or OpenVINO, after comparing what the file says with what PyTorch says.

    The file needs neither torch nor shrp_hf. Nothing is published when float32 outputs differ by more than 1.2e-4 of the
    largest, when too few predictions of a rounded file agree, or when it loses more than 0.3 points on the held-out rows of
    `--dataset` and a 95% interval says that this is no chance; `onnx.json` or `openvino.json` says what was reached. Without
    `--dataset` and `--texts` two dozen built-in sentences are compared.

    Example: `shrp-hf export out/demo/static --int8 --dataset docstrings --output out/demo/onnx`

    Example: `shrp-hf export out/demo/static --format openvino --precision int8-static --dataset docstrings --output out/ov`
    """
    from shrp_hf.export import ExportOptions, ExportRows, export_model, load_for_export
    from shrp_hf.tasks import Reading
    from shrp_hf.tasks.files import read_texts
    from shrp_hf.workflows.run_directory import check_output

    if texts is not None and (dataset is not None or corpus is not None):
        raise ValueError("Give one of `--dataset` and `--texts`, not both; a `--corpus` is a data set.")
    if int8 and precision not in ("float32", "int8"):
        raise ValueError(f"Give one of `--int8` and `--precision {precision}`, not both.")
    given = {"data-dir": data_dir, "text-column": text_column, "text-pair-column": text_pair_column}
    given |= {"label-column": label_column, "task": task}
    for name, value in given.items():
        if value is not None and dataset is None and corpus is None:
            raise ValueError(f"`--{name} {value}` belongs to `--dataset`, which is missing.")
    options = ExportOptions(format, "int8" if int8 else precision, graph, opset, embeddings, min_agreement, force)
    check_output(output, [model])
    scaled = None if calibration is None else read_texts(calibration, "calibration")
    rows = ExportRows(None if texts is None else read_texts(texts), calibration=scaled)
    if dataset is not None or corpus is not None:
        from shrp_hf.workflows.export_rows import rows_of_task

        reading = Reading(text_column, text_pair_column, label_column, task, corpus=corpus)
        data = read_task(model, dataset, data_dir, reading, seed=seed, max_validation=512)
        rows = rows_of_task(data, options, scaled)
    loaded, tokenizer = load_for_export(model)
    _say(export_model(loaded, tokenizer, output, options, rows))


def _say(path: Path) -> None:
    say = partial(console.print, soft_wrap=True)
    files = [path, *path.parent.glob("model.bin")] if path.suffix == ".xml" else [path]
    record: dict[str, Any] = json.loads(
        (path.parent / ("openvino.json" if len(files) > 1 else "onnx.json")).read_text("utf-8")
    )
    say(f"Float32 outputs differ by {record['float32']['largest_difference']:.1e} of the largest at most.")
    if "agreement" in record:
        found = record["agreement"]
        share = "undefined" if found["agreement"] is None else format(found["agreement"], ".4f")
        say(f"{record['precision']} agrees on {share} ({found['measure']}).")
    if "quality" in record:
        found = record["quality"]
        low, high = found["interval"]
        say(
            f"Held-out {found['metric']}: {found['model']:.4f} in PyTorch, {found['file']:.4f} in the file, on "
            f"{found['rows']} rows (95% interval of the loss {low:.4f} to {high:.4f})."
        )
    if record.get("graph", {}).get("milliseconds"):
        times = ", ".join(f"{name} {value:.1f} ms" for name, value in record["graph"]["milliseconds"].items())
        say(f"Kept the {record['graph']['kept']} graph ({times} for three batches on this machine).")
    names = ", ".join(file.name for file in files)
    size = sum(file.stat().st_size for file in files) / 1e6
    say(f"Written to {path.parent}: {names} ({size:.1f} MB), config, tokenizer, {record['format']}.json.")
