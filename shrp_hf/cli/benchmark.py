"""`shrp-hf benchmark`."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.markdown import Markdown
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from shrp_hf.cli.app import JsonOption, app, console, list_option, shape_of
from shrp_hf.defaults import BATCH_SIZE, ROUNDS


@app.command()
def benchmark(
    models: Annotated[list[str], typer.Argument(help="Hub ids or directories of models; the first is the baseline.")],
    runtimes: Annotated[
        list,
        list_option(str, "eager, compiled, onnx, int8, openvino, openvino-int8; the baseline runs in the first.", "names"),
    ] = "eager",  # type: ignore[assignment]
    shapes: Annotated[
        list, list_option(shape_of, "Batch x length of each workload, or none.", "shapes like 8x128")
    ] = "1x32,8x128",  # type: ignore[assignment]
    texts: Annotated[Path | None, typer.Option(help="Text file: its lines are one more workload, sorted by length.")] = None,
    batch_size: Annotated[int, typer.Option(help="Lines of the text file per batch.")] = BATCH_SIZE,
    max_length: Annotated[int | None, typer.Option(help="Most tokens of a line; default: the model's positions.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; default: torch's setting.")] = None,
    device: Annotated[str, typer.Option(help="Where PyTorch runs: cpu, cuda.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="Of PyTorch's weights: float32, bfloat16, float16.")] = "float32",
    rounds: Annotated[int, typer.Option(help="Rounds in which the models take turns.")] = ROUNDS,
    output: Annotated[Path | None, typer.Option(help="Directory for benchmark.md, .json and .png.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Measures models side by side as they are served: latency, throughput, memory, and what FLOPs had promised.

    All models and runtimes take turns in one run, so the ratios hold on a machine that slows down; let it do nothing else
    meanwhile. At batch 1 the times are the latency of a request.

    Example: `shrp-hf benchmark out/demo/dense out/demo/static --runtimes eager,onnx,int8 --shapes 1x32,8x128`
    """
    from shrp_hf.export import load_for_export
    from shrp_hf.measuring.environment import command_line, environment, instruction_sets, versions_of
    from shrp_hf.tasks.files import read_texts
    from shrp_hf.workflows.benchmark import ServingOptions, figures_of, measure_serving, write_serving
    from shrp_hf.workflows.run_directory import check_output

    if output is not None:
        check_output(output, models)
        output.mkdir(parents=True, exist_ok=True)  # what cannot be written there is known before hours of measuring
    lines = () if texts is None else tuple(read_texts(texts))
    options = ServingOptions(tuple(runtimes), tuple(shapes), lines, batch_size, max_length, threads, device, dtype, rounds)
    served = {name: load_for_export(path) for name, path in _names(models).items()}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("")
        result = measure_serving(
            served, options, watch=lambda doing, done, total: bar.update(task, description=doing, completed=done, total=total)
        )
    used = next(iter(result.rows)).timing
    about = {**environment(), "instruction sets": instruction_sets(), "threads": used.num_threads}
    about |= {**versions_of("onnxruntime", "openvino", "nncf"), "dtype": dtype, "command": command_line()}
    text = "\n".join(f"- {name}: {value}" for name, value in about.items()) + "\n\n" + result.markdown()
    if as_json:
        sys.stdout.write(json.dumps(figures_of(result, about)) + "\n")
    else:
        console.print(Markdown(text) if console.is_terminal else text, markup=False, soft_wrap=True)
    if output is not None:
        write_serving(result, about, output)
    if output is not None and not as_json:
        console.print(f"Written to {output}: benchmark.md, benchmark.json, benchmark.png.", soft_wrap=True)


def _names(models: list[str]) -> dict[str, str]:
    """The last part of each path where those differ, else the whole path."""
    if len(set(models)) < len(models):
        raise ValueError(f"`MODELS` must be different models, got {models}.")
    short = [Path(model).name for model in models]
    return dict(zip(short if len(set(short)) == len(short) else models, models, strict=True))
