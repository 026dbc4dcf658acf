"""The command line's application, and what its commands share."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

if TYPE_CHECKING:
    from shrp_hf.tasks import Reading, Task

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="markdown")
console = Console()

ModelArgument = Annotated[str, typer.Argument(help="Hub id or directory of a model.")]
DatasetOption = Annotated[
    str | None,
    typer.Option(
        help="docstrings, a GLUE task, sst5, a file or directory of files (CSV, TSV, JSON Lines, Parquet, CoNLL, or BEIR's "
        "layout), or a Hub data set."
    ),
]
CorpusOption = Annotated[
    str | None, typer.Option(help="Embeddings: file or directory of texts to learn from, without labels.")
]
DataDirOption = Annotated[Path | None, typer.Option(help="Directory with the task's files, read instead of the Hub.")]
TextColumnOption = Annotated[str | None, typer.Option(help="Column of the text; default: found by its name.")]
TextPairColumnOption = Annotated[str | None, typer.Option(help="Column of the second text of a pair.")]
LabelColumnOption = Annotated[
    str | None, typer.Option(help="Column of the label, or one of 0 and 1 for each label: a,b,c; default: found by its name.")
]
LearningRateOption = Annotated[
    float | None,
    typer.Option(help="Of the training of the small model; default: the recipe's, chosen on an encoder of width 384."),
]
PairsOption = Annotated[
    str | None, typer.Option(help="Embeddings: file of texts that belong together, on which a recovery ends.")
]
TaskOption = Annotated[
    Literal["classification", "multilabel", "regression", "tokens", "ranking", "embeddings"] | None,
    typer.Option(help="Kind of task, where the data do not say."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON alone, for scripts.")]
FORCE_HELP = "Go on with a dense model that is no better than the majority class."
OutputOption = Annotated[Path, typer.Option(help="Directory for what is written.")]
RecipeOption = Annotated[
    str,
    typer.Option(
        help="default (experts by HIS, the dense model teaches, a recovery) or paper (SHRP as published: routers choose)."
    ),
]
EXPERT_SELECTOR_HELP = (
    "What chooses the experts: usage (of trained routers), or his, hies, entropy, magnitude, random (heads of the dense "
    "model, without routers); default: the recipe's."
)
ExpertSelectorOption = Annotated[str | None, typer.Option(help=EXPERT_SELECTOR_HELP)]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Train and write nothing: say what would be trained, and about how long it takes.")
]
NOT_MET = 3
NOT_VERIFIED = 4
EXIT_CODES = {
    0: "All is well.",
    1: "An error, in one line; `--verbose` shows its trace. What was finished before is kept, and taken up by the next start.",
    2: "An option is unknown, or its value is not of its kind.",
    NOT_MET: "`compress`: a target is missed. The best model found is written, and the report says what it reaches.",
    NOT_VERIFIED: "All is written, but the model gives other outputs in a new process than where it was trained.",
}
SeedOption = Annotated[int, typer.Option(help="Seed of everything that is drawn.")]


def shape_of(text: str) -> tuple[int, int]:
    """Reads "8x128", batch and length; a ValueError for anything else."""
    batch_size, length = text.split("x")
    return int(batch_size), int(length)


def shape_option(help: str) -> Any:
    """An option whose value is a shape.

    Args:
        help: Help of the option.
    """

    def parse(text: str) -> tuple[int, int]:
        try:
            return shape_of(text)
        except ValueError as error:
            raise typer.BadParameter(f"{text!r} is no shape such as 8x128, batch x length") from error

    return typer.Option(parser=parse, help=help, metavar="BATCHxLENGTH")


def list_option(parse: Callable[[str], Any], help: str, meaning: str = "") -> Any:
    """An option whose value is a list separated by commas.

    Args:
        parse: Turns an item into its value, with a ValueError for what it is not.
        help: Help of the option.
        meaning: What the items are, for the error; for numbers it goes without saying.
    """

    def parse_all(text: str) -> list[Any]:
        try:
            return [parse(word.strip()) for word in text.split(",") if word.strip()]
        except ValueError as error:
            raise typer.BadParameter(f"{text!r} is no list of {meaning or 'numbers'} separated by commas") from error

    return typer.Option(parser=parse_all, help=help, metavar="LIST")


def read_task(model: str | None, dataset: str | None, data_dir: Path | None, reading: "Reading", **sizes: Any) -> "Task":
    """Reads the data of a command, with labels in the order of its fine-tuned model, and says what was understood.

    Args:
        model: The model; None for one that is still to be fine-tuned.
        dataset: Value of `--dataset`; None where embeddings learn from `--corpus` alone.
        data_dir: Value of `--data-dir`.
        reading: Values of `--text-column`, `--text-pair-column`, `--label-column`, `--task`, `--corpus` and `--pairs`.
        **sizes: Other arguments of `load_task`.

    Raises:
        ValueError: There is neither a data set nor a corpus, or see `load_task`.
    """
    from shrp_hf.tasks import label_names_of, load_task

    if dataset is None and reading.corpus is None:
        raise ValueError("Give `--dataset`, or for `--task embeddings` texts to learn from by `--corpus`.")
    names = () if model is None else label_names_of(model)
    task = load_task(dataset or "", data_dir, replace(reading, label_names=names), **sizes)
    say_task(task)
    return task


def say_task(task: "Task") -> None:
    """Prints what was understood of the data, before anything is done with it."""
    console.print(task.describe(), markup=False, highlight=False, soft_wrap=True)


def leave(problem: str, code: int = NOT_VERIFIED) -> None:
    """Ends the command with `code` after an error line, where there is a problem; what was written stays."""
    if problem:
        Console(stderr=True).print("[red]Error:[/]", problem, highlight=False, soft_wrap=True)
        raise typer.Exit(code)


@app.callback()
def options(verbose: Annotated[bool, typer.Option("--verbose", help="Show the trace of an error.")] = False) -> None:
    """Makes Transformer encoders smaller and faster by attention head.

    Example: `shrp-hf train bert-base-uncased --dataset sst2 --num-expert-layers 6 --output out/sst2`
    """


def main() -> None:
    """Runs the command; an error is one line and exit code 1, with `--verbose` also its trace."""
    try:
        app()
    except (ValueError, ImportError, OSError, RuntimeError) as error:
        if "--verbose" in sys.argv:
            raise
        Console(stderr=True).print("[red]Error:[/]", str(error), highlight=False, soft_wrap=True)
        sys.exit(1)
