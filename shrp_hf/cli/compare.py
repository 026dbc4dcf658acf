"""`shrp-hf compare`."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from shrp_hf.cli.app import (
    EXPERT_SELECTOR_HELP,
    FORCE_HELP,
    CorpusOption,
    DataDirOption,
    DatasetOption,
    DryRunOption,
    LabelColumnOption,
    ModelArgument,
    OutputOption,
    PairsOption,
    TaskOption,
    TextColumnOption,
    TextPairColumnOption,
    app,
    list_option,
    read_task,
)
from shrp_hf.defaults import (
    BATCH_SIZE,
    CALIBRATION_SAMPLES,
    DENSE_LEARNING_RATE,
    DSP_EPOCHS,
    MAX_LENGTH,
    MIN_HEADS_PER_LAYER,
    SEED,
    SIGNATURE_SIZE,
    TOLERANCE,
)

if TYPE_CHECKING:
    from shrp_hf.workflows.compare import Comparison


_ALPHA = 'HIES: weight of importance, or "search" (on held-out rows).'


def _alpha(text: str) -> float | None:
    try:
        return None if text == "search" else float(text)
    except ValueError as error:
        raise typer.BadParameter(f'{text!r} is neither a number nor "search"') from error


@app.command()
def compare(
    model: ModelArgument,
    output: OutputOption,
    dataset: DatasetOption = None,
    data_dir: DataDirOption = None,
    text_column: TextColumnOption = None,
    text_pair_column: TextPairColumnOption = None,
    label_column: LabelColumnOption = None,
    task: TaskOption = None,
    corpus: CorpusOption = None,
    pairs: PairsOption = None,
    selectors: Annotated[
        Any, list_option(str, "hies, his, entropy, cahp, cahp-direct, magnitude, random, dsp, dsp-pipelined.")
    ] = "",
    keep: Annotated[Any, list_option(float, "Shares of the heads that stay.")] = "",
    heads: Annotated[Any, list_option(int, "Numbers of heads that stay.")] = "",
    knee_degrees: Annotated[Any, list_option(int, "Degrees of CAHP's knee; the others keep as many heads as CAHP.")] = "",
    expert_layers: Annotated[Any, list_option(int, "SHRP: numbers of layers to convert.")] = "",
    experts: Annotated[Any, list_option(int, "SHRP: experts that stay in each converted layer.")] = "1",
    truncate: Annotated[Any, list_option(int, "First-k-layers truncation: values of k.")] = "",
    spread: Annotated[Any, list_option(int, "Evenly spread layers: how many stay.")] = "",
    thin: Annotated[Any, list_option(float, "Thin layers: speed-ups that heads and neurons are searched for.")] = "",
    thin_keep: Annotated[Any, list_option(float, "Thin layers, all alike: shares of heads and neurons that stay.")] = "",
    seeds: Annotated[Any, list_option(int, "Seeds.")] = "0,1,2",
    recipes: Annotated[Any, list_option(str, "default, paper: how conversions and recoveries train.")] = "default",
    recovery_epochs: Annotated[Any, list_option(float, "Epochs of recovery after the cut; default: the recipe's.")] = "",
    experts_per_sequence: Annotated[Any, list_option(int, "SHRP: Top-k of the routers; default: the recipe's.")] = "",
    balance_coef: Annotated[Any, list_option(float, "SHRP: weights of the balance loss; default: the recipe's.")] = "",
    expert_selectors: Annotated[Any, list_option(str, f"SHRP: {EXPERT_SELECTOR_HELP}")] = "",
    without_random: Annotated[bool, typer.Option("--without-random", help="Leave random heads out.")] = False,
    without_control: Annotated[
        bool, typer.Option("--without-control", help="Leave the dense model out that is trained on for as long.")
    ] = False,
    dense_epochs: Annotated[float, typer.Option(help="Fine-tune MODEL, once per seed; 0: it is fine-tuned.")] = 0.0,
    dense_learning_rate: Annotated[float, typer.Option(help="Of that fine-tuning.")] = DENSE_LEARNING_RATE,
    examples_per_epoch: Annotated[int | None, typer.Option(help="Training examples per epoch; default: all.")] = None,
    batch_size: Annotated[int, typer.Option(help="Sequences per step.")] = BATCH_SIZE,
    max_length: Annotated[int, typer.Option(help="Longest sequence in tokens.")] = MAX_LENGTH,
    max_train: Annotated[int | None, typer.Option(help="Most training rows.")] = None,
    calibration_samples: Annotated[int, typer.Option(help="Training rows to score heads on.")] = CALIBRATION_SAMPLES,
    signature_size: Annotated[int, typer.Option(help="CAHP: side of resized attention maps; 48 for pairs.")] = SIGNATURE_SIZE,
    min_heads_per_layer: Annotated[int, typer.Option(help="Heads that every layer keeps.")] = MIN_HEADS_PER_LAYER,
    alpha: Annotated[Any, typer.Option(parser=_alpha, metavar="NUMBER", help=_ALPHA)] = "0.5",
    dsp_epochs: Annotated[float, typer.Option(help="DSP: epochs that learn what to keep, before recovery.")] = DSP_EPOCHS,
    tolerance: Annotated[float, typer.Option(help="Regression: predictions so close agree.")] = TOLERANCE,
    bf16: Annotated[bool, typer.Option("--bf16", help="Train in bfloat16 autocast.")] = False,
    split_seed: Annotated[int, typer.Option(help="Seed of the held-out cut: that of MODEL's fine-tuning.")] = SEED,
    force: Annotated[bool, typer.Option("--force", help=FORCE_HELP)] = False,
    keep_models: Annotated[bool, typer.Option(help="Keep dense and routed models in OUTPUT/models.")] = True,
    speed: Annotated[bool, typer.Option(help="Measure throughput at the end, of every shape in one run.")] = True,
    report_only: Annotated[bool, typer.Option("--report-only", help="Compute nothing: tables of what is there.")] = False,
    dry_run: DryRunOption = False,
) -> None:
    """Compares ways to make one model smaller: selectors x budgets x seeds, SHRP, thin layers, fewer layers, random.

    Every cell is a file. Started again after an interruption it computes what is missing; started twice at a time, the
    two share the work; with another grid it adds to the directory. All methods get the same recovery. Nothing is ever
    chosen on the reported rows. `--dry-run` says beforehand what is left to do, and how long.

    Example: `shrp-hf compare out/demo/dense --dataset docstrings --selectors hies,his,cahp --keep 0.75,0.5
    --recovery-epochs 0,1 --truncate 1,3 --expert-layers 3,5 --output out/compare`
    """
    from shrp_hf.tasks import Reading
    from shrp_hf.workflows.compare import (
        Comparison,
        Grid,
        Settings,
        measure_speed,
        preview_comparison,
        read_cells,
        write_results,
    )

    if dry_run and report_only:
        raise ValueError("`dry_run` and `report_only` are two things: leave one of them out.")
    grid = Grid(
        selectors=selectors,
        keep=keep,
        heads=heads,
        knee_degrees=knee_degrees,
        expert_layers=expert_layers,
        experts=experts,
        truncate=truncate,
        spread=spread,
        thin=thin,
        thin_keep=thin_keep,
        seeds=seeds,
        recipes=recipes,
        recovery_epochs=recovery_epochs or (None,),
        experts_per_sequence=experts_per_sequence or (None,),
        balance_coefs=balance_coef or (None,),
        expert_selectors=expert_selectors or (None,),
        without_random=without_random,
        without_control=without_control,
    )
    settings = Settings(
        model=model,
        dense_epochs=dense_epochs,
        dense_learning_rate=dense_learning_rate,
        examples_per_epoch=examples_per_epoch,
        batch_size=batch_size,
        max_length=max_length,
        calibration_samples=calibration_samples,
        signature_size=signature_size,
        min_heads_per_layer=min_heads_per_layer,
        alpha=alpha,
        dsp_epochs=dsp_epochs,
        tolerance=tolerance,
        bf16=bf16,
        split_seed=split_seed,
    )
    console = Console(file=sys.stdout)
    errors = {}
    if not report_only:
        reading = Reading(text_column, text_pair_column, label_column, task, corpus=corpus, pairs=pairs)
        data = read_task(None if dense_epochs else model, dataset, data_dir, reading, seed=split_seed, max_train=max_train)
        comparison = Comparison(settings, grid, data, output, force=force)
        if dry_run:
            console.print(Markdown(preview_comparison(comparison).text()))
            return
        errors = _run(comparison, console)
        if not keep_models:
            comparison.drop_models()
    try:
        if speed and not errors and not report_only:
            console.print("Measuring the speed of every shape in one run")
            measure_speed(output, read_cells(output))
    finally:  # what was trained is shown, whatever became of the timing
        for path in write_results(output):
            console.print(f"Written: {path}", soft_wrap=True)
    for key, error in errors.items():
        console.print(f"[red]Failed:[/] {key}: {error} (see {key}.error in {output / 'cells'} or parts)", soft_wrap=True)
    if errors:
        raise typer.Exit(1)


def _run(comparison: "Comparison", console: Console) -> dict[str, str]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    # Cells take minutes, so what is left is judged by all that were done, not by the last 30 seconds.
    with Progress(*columns, console=console, speed_estimate_period=float("inf")) as progress, _quiet(comparison.output):
        bar = progress.add_task("", total=None)

        def watch(done: int, total: int, doing: str) -> None:
            progress.update(bar, completed=done, total=total, description=doing or "waiting for other runs")
            if doing and not console.is_terminal:
                console.print(f"{done} of {total} cells; now {doing}", soft_wrap=True)

        return comparison.run(watch)


@contextlib.contextmanager
def _quiet(output: Path) -> Iterator[None]:
    """Sends what the trainings print to a file of this process: it would tear the progress bar."""
    log = output / "logs" / f"{os.getpid()}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        yield
