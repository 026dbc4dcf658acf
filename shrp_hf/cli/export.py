"""`shrp-hf export`."""

from pathlib import Path
from typing import Annotated, Literal

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


@app.command()
def export(
    model: ModelArgument,
    output: OutputOption,
    format: Annotated[Literal["onnx"], typer.Option(help="The file's format.")] = "onnx",
    int8: Annotated[bool, typer.Option("--int8", help="Quantise: int8 weights, uint8 activations.")] = False,
    dataset: Annotated[str | None, typer.Option(help="Compare on the held-out rows of this task, 512 at most.")] = None,
    data_dir: DataDirOption = None,
    text_column: TextColumnOption = None,
    text_pair_column: TextPairColumnOption = None,
    label_column: LabelColumnOption = None,
    task: TaskOption = None,
    corpus: CorpusOption = None,
    texts: Annotated[Path | None, typer.Option(help="Compare on the lines of this text file.")] = None,
    min_agreement: Annotated[float, typer.Option(help="Share of int8 predictions that must be PyTorch's.")] = 0.9,
    seed: SeedOption = 0,
) -> None:
    """Writes a model for ONNX Runtime, after comparing what the file says with what PyTorch says.

    The file needs neither torch nor shrp_hf. Nothing is published when outputs differ by more than 1.2e-4 of the largest,
    or when too few int8 predictions agree; `onnx.json` says what was reached. Without `--dataset` and `--texts` two dozen
    built-in sentences are compared.

    Example: `shrp-hf export out/demo/static --int8 --dataset docstrings --output out/demo/onnx`
    """
    import json

    from shrp_hf.onnx_export import export_onnx, load_for_export
    from shrp_hf.runs import check_output
    from shrp_hf.tasks import Reading
    from shrp_hf.tasks.files import read_texts

    if texts is not None and (dataset is not None or corpus is not None):
        raise ValueError("Give one of `--dataset` and `--texts`, not both; a `--corpus` is a data set.")
    given = {"data-dir": data_dir, "text-column": text_column, "text-pair-column": text_pair_column}
    given |= {"label-column": label_column, "task": task}
    for name, value in given.items():
        if value is not None and dataset is None and corpus is None:
            raise ValueError(f"`--{name} {value}` belongs to `--dataset`, which is missing.")
    check_output(output, [model])
    rows: list | None = None
    if texts is not None:
        rows = read_texts(texts)
    elif dataset is not None or corpus is not None:
        reading = Reading(text_column, text_pair_column, label_column, task, corpus=corpus)
        data = read_task(model, dataset, data_dir, reading, seed=seed, max_validation=512)
        rows = data.kind.texts(data.validation)
    loaded, tokenizer = load_for_export(model)
    path = export_onnx(loaded, tokenizer, output, int8=int8, texts=rows, min_agreement=min_agreement)
    record = json.loads(path.with_name("onnx.json").read_text(encoding="utf-8"))
    console.print(f"Float32 outputs differ by {record['float32']['largest_difference']:.1e} of the largest at most.")
    if int8:
        console.print(f"int8 agrees on {record['int8']['agreement']:.4f} ({record['int8']['measure']}).")
    console.print(f"Written to {output}: {path.name} ({path.stat().st_size / 1e6:.1f} MB), config, tokenizer, onnx.json.")
