"""The command line's application, and what its commands share."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown")
console = Console()

ModelArgument = Annotated[str, typer.Argument(help="Hub id or directory of a model.")]
DatasetOption = Annotated[
    str, typer.Option(help="docstrings, a GLUE task, sst5, a directory of TSV files, or a Hub data set.")
]
DataDirOption = Annotated[Path | None, typer.Option(help="Directory with the task's files, read instead of the Hub.")]
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
