"""`shrp-hf trim-vocabulary`."""

from pathlib import Path
from typing import Annotated

import typer

from shrp_hf.cli.app import ModelArgument, OutputOption, app, console
from shrp_hf.defaults import VOCABULARY_FLOOR


@app.command()
def trim_vocabulary(
    model: ModelArgument,
    corpus: Annotated[Path, typer.Option(help="Text file, a text a line, like what the model will read.")],
    output: OutputOption,
    held_out: Annotated[
        Path | None, typer.Option(help="Text file to report unknown tokens on; default: a tenth of the corpus.")
    ] = None,
    floor: Annotated[
        int, typer.Option(help="Least number of tokens: the commonest join those that the corpus uses.")
    ] = VOCABULARY_FLOOR,
    alphabet: Annotated[
        bool, typer.Option("--alphabet/--no-alphabet", help="Keep every single character: any word can be spelled.")
    ] = True,
) -> None:
    """Cuts from tokenizer and embeddings what a corpus never uses; special tokens stay in any case.

    Every text of the corpus is read as before, and gives the same outputs. Tokenizers of WordPiece, Unigram and BPE can be
    trimmed.

    Example: `shrp-hf trim-vocabulary out/demo/static --corpus queries.txt --output out/small`
    """
    from shrp_hf.export import load_for_export
    from shrp_hf.tasks.files import read_texts
    from shrp_hf.workflows.run_directory import check_output
    from shrp_hf.workflows.vocabulary import TrimOptions, copy_sentence_modules
    from shrp_hf.workflows.vocabulary import trim_vocabulary as trim

    options = TrimOptions(floor, alphabet)
    check_output(output, [model])
    texts = read_texts(corpus, "corpus")
    others = None if held_out is None else read_texts(held_out, "held-out")
    result = trim(*load_for_export(model), texts, output, options, others)
    copy_sentence_modules(Path(model).expanduser(), output)
    before, after = result.tokens
    console.print(f"Tokens: {before:,} to {after:,}. Parameters: {result.parameters[0]:,} to {result.parameters[1]:,}.")
    console.print(
        f"All {result.compared_texts:,} texts of the corpus are read as before; outputs differ by "
        f"{result.largest_difference:.0e} of the largest at most, in float64.",
        soft_wrap=True,
    )
    console.print(
        f"Held out ({result.held_out}, {result.held_out_texts:,}): {result.same:.1%} are read as before, unknown tokens "
        f"{result.unknown[0]:.3%} to {result.unknown[1]:.3%}, tokens a text {result.tokens_per_text[0]:.2f} to "
        f"{result.tokens_per_text[1]:.2f}.",
        soft_wrap=True,
    )
    console.print(f"Written to {output}: the model, its tokenizer, vocabulary.json.", soft_wrap=True)
