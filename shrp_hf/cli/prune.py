"""`shrp-hf prune`."""

from typing import Annotated

import typer
from rich.markdown import Markdown

from shrp_hf.cli.app import (
    CorpusOption,
    DataDirOption,
    DatasetOption,
    LabelColumnOption,
    LearningRateOption,
    ModelArgument,
    OutputOption,
    PairsOption,
    SeedOption,
    TaskOption,
    TextColumnOption,
    TextPairColumnOption,
    app,
    console,
    read_task,
    shape_option,
)
from shrp_hf.defaults import BATCH_SIZE, CALIBRATION_SAMPLES, MAX_LENGTH, MIN_HEADS_PER_LAYER, SEED, SIGNATURE_SIZE


@app.command()
def prune(
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
    selector: Annotated[str, typer.Option(help="hies, his, entropy, cahp, cahp-direct, magnitude, random or usage.")] = "hies",
    keep: Annotated[float | None, typer.Option(help="Share of the heads that stay (with --neurons, of both).")] = None,
    heads: Annotated[int | None, typer.Option(help="Number of heads that stay.")] = None,
    speedup: Annotated[
        float | None, typer.Option(help="How many times as fast, measured on this machine: heads and neurons go.")
    ] = None,
    keep_latency: Annotated[float | None, typer.Option(help="The same, as a share of the time.")] = None,
    keep_flops: Annotated[float | None, typer.Option(help="Share of the FLOPs that stays: heads and neurons go.")] = None,
    keep_parameters: Annotated[float | None, typer.Option(help="Share of the model's parameters that stays.")] = None,
    keep_quality: Annotated[float | None, typer.Option(help="Share of the quality that stays, on held-out rows.")] = None,
    knee_degree: Annotated[int | None, typer.Option(help="CAHP: degree of the knee's polynomial, 2 to 6.")] = None,
    neurons: Annotated[
        bool | None,
        typer.Option("--neurons/--no-neurons", help="Whether FFN neurons may go; default: for a speed-up, latency or FLOPs."),
    ] = None,
    shape: Annotated[tuple, shape_option("Batch and length that times and FLOPs are of.")] = "8x128",  # type: ignore[assignment]
    runtime: Annotated[str, typer.Option(help="What times are of: eager, onnx or int8.")] = "eager",
    threads: Annotated[int | None, typer.Option(help="CPU threads that times are of; default: torch's setting.")] = None,
    alpha: Annotated[float | None, typer.Option(help="HIES: weight of importance against entropy.")] = None,
    signature_size: Annotated[int, typer.Option(help="CAHP: side of resized attention maps; 48 for pairs.")] = SIGNATURE_SIZE,
    calibration_samples: Annotated[int, typer.Option(help="Training rows to score on.")] = CALIBRATION_SAMPLES,
    per_layer: Annotated[bool, typer.Option(help="Spread the heads evenly over the layers.")] = False,
    min_heads_per_layer: Annotated[int, typer.Option(help="Heads that every layer keeps.")] = MIN_HEADS_PER_LAYER,
    output_means: Annotated[
        bool, typer.Option("--output-means/--zeros", help="What is cut leaves its mean in the output bias, or nothing.")
    ] = True,
    recovery_epochs: Annotated[float, typer.Option(help="Epochs of training after the cut.")] = 0.0,
    learning_rate: LearningRateOption = None,
    recipe: Annotated[str, typer.Option(help="How: default (the unpruned model teaches) or paper (nobody).")] = "default",
    teacher: Annotated[str | None, typer.Option(help="Model that teaches instead: of a routed one, the dense.")] = None,
    bf16: Annotated[bool, typer.Option("--bf16", help="Train in bfloat16 autocast.")] = False,
    batch_size: Annotated[int, typer.Option(help="Sequences per batch.")] = BATCH_SIZE,
    max_length: Annotated[int, typer.Option(help="Longest sequence in tokens.")] = MAX_LENGTH,
    max_train: Annotated[int | None, typer.Option(help="Most training rows.")] = None,
    seed: SeedOption = SEED,
) -> None:
    """Prunes the heads of a fine-tuned model, and its FFN neurons, without retraining unless asked to.

    Give exactly one of `--speedup`, `--keep-latency`, `--keep-flops`, `--keep-parameters`, `--keep`, `--heads`,
    `--keep-quality` and `--knee-degree`. Head pruning alone saves little: half the heads of BERT-base are 13% of its
    parameters. For a speed-up the time of a layer is measured here once, by heads and neurons, in some tens of seconds, and
    kept. CAHP's knee hardly depends on the data: the degree sets the count.

    Example: `shrp-hf prune out/demo/dense --dataset docstrings --selector hies --keep 0.5 --output out/half`

    Example: `shrp-hf prune out/demo/dense --dataset docstrings --speedup 2 --shape 1x32 --runtime onnx --output out/fast`
    """
    from shrp_hf.cli.progress import one_bar_each
    from shrp_hf.tasks import Reading
    from shrp_hf.workflows.prune import PruneOptions, prune_posthoc

    prune_options = PruneOptions(
        selector=selector,
        keep=keep,
        heads=heads,
        speedup=speedup,
        keep_latency=keep_latency,
        keep_flops=keep_flops,
        keep_parameters=keep_parameters,
        neurons=neurons,
        shape=shape,
        runtime=runtime,
        threads=threads,
        keep_quality=keep_quality,
        knee_degree=knee_degree,
        alpha=alpha,
        signature_size=signature_size,
        calibration_samples=calibration_samples,
        per_layer=per_layer,
        min_heads_per_layer=min_heads_per_layer,
        output_means=output_means,
        recovery_epochs=recovery_epochs,
        learning_rate=learning_rate,
        recipe=recipe,
        teacher=teacher,
        bf16=bf16,
        batch_size=batch_size,
        max_length=max_length,
        seed=seed,
    )
    reading = Reading(text_column, text_pair_column, label_column, task, corpus=corpus, pairs=pairs)
    data = read_task(model, dataset, data_dir, reading, seed=seed, max_train=max_train)
    with one_bar_each(console) as bar:
        report = prune_posthoc(model, data, output, prune_options, say=lambda text: console.rule(text), bar=bar)
    console.print(Markdown(report.read_text(encoding="utf-8")))
    console.print(f"Written to {output}: the model, plan.json, report.md and pictures.")
