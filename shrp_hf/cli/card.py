"""`shrp-hf card`."""

from pathlib import Path
from typing import Annotated

import typer

from shrp_hf.cli.app import app, console


@app.command()
def card(folder: Annotated[Path, typer.Argument(help="Directory of a model that `train` or `prune` made.")]) -> None:
    """Writes the model card anew, from the record beside the model; an edited README.md is overwritten.

    It says what was recorded when the model was made (`shrp_record.json`) and nothing else: nothing is measured here.

    Example: `shrp-hf card out/demo/static`
    """
    from shrp_hf.publishing.card import write_card

    console.print(f"Written: {write_card(folder)}", soft_wrap=True)
