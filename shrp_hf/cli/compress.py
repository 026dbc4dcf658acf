"""`shrp-hf compress`."""

from typing import Annotated

import typer
from rich.markdown import Markdown

from shrp_hf.cli.app import (
    FORCE_HELP,
    NOT_MET,
    CorpusOption,
    DataDirOption,
    DatasetOption,
    DryRunOption,
    ExpertSelectorOption,
    LabelColumnOption,
    LearningRateOption,
    ModelArgument,
    OutputOption,
    PairsOption,
    RecipeOption,
    SeedOption,
    TaskOption,
    TextColumnOption,
    TextPairColumnOption,
    app,
    console,
    leave,
    list_option,
    read_task,
)
from shrp_hf.defaults import BATCH_SIZE, DENSE_LEARNING_RATE, MAX_LENGTH, MAX_TRIALS, SEED


@app.command()
def compress(
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
    speedup: Annotated[float | None, typer.Option(help="Throughput to reach, as a multiple of the model's own.")] = None,
    keep_quality: Annotated[float | None, typer.Option(help="Share of the quality to keep, on held-out rows.")] = None,
    shape: Annotated[str, typer.Option(help="Sequences x tokens per call to measure speed at; 1x32: one query.")] = "8x128",
    device: Annotated[str, typer.Option(help="Where to measure speed: cpu or cuda.")] = "cpu",
    structures: Annotated[
        list | None,
        list_option(
            str, "What it may become: thin, uniform, experts, spread, first; default all that the model can.", "names"
        ),
    ] = None,
    experts: Annotated[
        str | None, typer.Option(help="Experts per layer to consider, such as 1,2,4; default 1, 2, 4, ... to all.")
    ] = None,
    max_trials: Annotated[int, typer.Option(help="Most candidates to train.")] = MAX_TRIALS,
    dense_epochs: Annotated[float, typer.Option(help="Fine-tuning first; 0: the model is fine-tuned on this task.")] = 0.0,
    dense_learning_rate: Annotated[float, typer.Option(help="Learning rate of that fine-tuning.")] = DENSE_LEARNING_RATE,
    recipe: RecipeOption = "default",
    expert_selector: ExpertSelectorOption = None,
    balance_epochs_per_layer: Annotated[float | None, typer.Option(help="Routers: epochs of balance a layer.")] = None,
    specialise_epochs: Annotated[float | None, typer.Option(help="Routers: epochs of stage specialise.")] = None,
    recovery_epochs: Annotated[float | None, typer.Option(help="Epochs after pruning.")] = None,
    learning_rate: LearningRateOption = None,
    batch_size: Annotated[int, typer.Option(help="Sequences per step.")] = BATCH_SIZE,
    max_length: Annotated[int, typer.Option(help="Longest sequence in tokens.")] = MAX_LENGTH,
    max_train: Annotated[int | None, typer.Option(help="Most training rows.")] = None,
    examples_per_epoch: Annotated[int | None, typer.Option(help="Examples that count as an epoch; default all.")] = None,
    force: Annotated[bool, typer.Option("--force", help=FORCE_HELP)] = False,
    seed: SeedOption = SEED,
    dry_run: DryRunOption = False,
) -> None:
    """Makes a fine-tuned model as fast as asked, or as fast as the quality asked for allows, or both.

    A candidate is thin layers (few heads and neurons, searched layer by layer by the time that they take on this machine, or
    uniform), expert layers (SHRP), or fewer layers (evenly spread, or the first). It measures how fast each
    runs here, and refuses a speed-up that none reaches. Then it trains candidates, the most promising first, and chooses by
    measured speed and by quality on rows held out of the training set. The best so far is always in `model`, and Ctrl-C keeps
    it. The reported rows only verify the result. Writes `model`, `report.html`, `report.md`, `trials.png` and
    `compress.json`. Started again, with the same or other targets, it trains nothing twice. `--dry-run` says beforehand what
    it would train, and how long.

    Exit code 0: the targets are met. 3: they are not; the best model found is written all the same, and the report says
    what it reaches. 4: the written model does not give the same outputs in a new process. 1: an error.

    Example: `shrp-hf compress out/demo/dense --dataset docstrings --speedup 4 --output out/fast`
    """
    from shrp_hf.cli.progress import one_bar_each
    from shrp_hf.tasks import Reading
    from shrp_hf.training.recipes import find_recipe
    from shrp_hf.workflows.compress import Compression, CompressionPreview, CompressOptions, Targets

    batch_size_measured, length = _numbers("shape", shape, "x", 2)
    options = CompressOptions(
        Targets(speedup, keep_quality),
        shape=(batch_size_measured, length),
        device=device,
        structures=None if structures is None else tuple(structures),
        experts=None if experts is None else _numbers("experts", experts, ","),
        max_trials=max_trials,
        recipe=find_recipe(
            recipe,
            expert_selector=expert_selector,
            balance_epochs_per_layer=balance_epochs_per_layer,
            specialise_epochs=specialise_epochs,
            recovery_epochs=recovery_epochs,
            learning_rate=learning_rate,
            recovery_learning_rate=learning_rate,
        ),
        dense_epochs=dense_epochs,
        dense_learning_rate=dense_learning_rate,
        batch_size=batch_size,
        max_length=max_length,
        examples_per_epoch=examples_per_epoch,
        seed=seed,
        force=force,
    )
    reading = Reading(text_column, text_pair_column, label_column, task, corpus=corpus, pairs=pairs)
    data = read_task(None if dense_epochs else model, dataset, data_dir, reading, seed=seed, max_train=max_train)
    if dry_run:
        preview = CompressionPreview(model, data, output, options).preview(show=lambda text: console.print(Markdown(text)))
        console.print(Markdown(preview.text()))
        return
    with one_bar_each(console) as bar:
        compression = Compression(model, data, output, options, bar=bar)
        verdict = compression.run(say=console.rule, show=lambda text: console.print(Markdown(text)))
    console.print(Markdown((output / "report.md").read_text(encoding="utf-8")))
    console.print(f"Written to {output}: model, report.html, report.md, trials.png, compress.json.")
    leave(verdict.problem)
    if not verdict.met:
        raise typer.Exit(NOT_MET)


def _numbers(name: str, text: str, separator: str, count: int | None = None) -> tuple[int, ...]:
    parts = text.lower().split(separator)
    if not all(part.strip().isdecimal() for part in parts) or count not in (None, len(parts)):
        example = "8x128" if separator == "x" else "1,2,4"
        raise ValueError(f"`{name}` must be written like {example}, got {text!r}.")
    return tuple(map(int, parts))
