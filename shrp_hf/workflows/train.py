"""The main job end to end: fine-tune, convert, specialise, prune, save, open again in a new process, report."""

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, set_seed

from shrp_hf.checkpoints import open_tokenizer
from shrp_hf.defaults import BATCH_SIZE, DENSE_EPOCHS, DENSE_LEARNING_RATE, KEEP_EXPERTS, MAX_LENGTH, SEED
from shrp_hf.publishing.card import write_card
from shrp_hf.publishing.plots import check_drawable, plot_usage
from shrp_hf.publishing.record import Rows, RunRecord, expert_choice, origin
from shrp_hf.publishing.report import compare_models, evaluate_on, measure_models, write_text
from shrp_hf.selectors.usage import usage_table
from shrp_hf.tasks.fine_tuned import load_fine_tuned, load_to_fine_tune
from shrp_hf.tasks.task import Task
from shrp_hf.training.recipes import RECIPES, Recipe, Setup, check_lesson_of, convert, fine_tune, recover, without_routers
from shrp_hf.workflows.run_directory import check_output, claim, kept_model, problem_when_reopened

logger = logging.getLogger(__name__)

REOPENED = "Opened in a new process without shrp_hf, `static` gives the same outputs."


@dataclass(frozen=True)
class WorkflowOptions:
    """How the main job trains.

    Args:
        num_expert_layers: Layers to convert, counted from the last; None: all but the first.
        keep: Experts that stay in each converted layer.
        recipe: How they are converted and recovered.
        dense_epochs: Epochs of fine-tuning before the conversion; 0 takes the model as it is.
        dense_learning_rate: Learning rate of the dense fine-tuning.
        batch_size: Sequences per step.
        max_length: Longest sequence in tokens.
        examples_per_epoch: Examples that count as an epoch; None: the whole training set.
        seed: Seed of everything that is drawn.
    """

    num_expert_layers: int | None = None
    keep: int = KEEP_EXPERTS
    recipe: Recipe = RECIPES["default"]
    dense_epochs: float = DENSE_EPOCHS
    dense_learning_rate: float = DENSE_LEARNING_RATE
    batch_size: int = BATCH_SIZE
    max_length: int = MAX_LENGTH
    examples_per_epoch: int | None = None
    seed: int = SEED


class Workflow:
    """One run of the main job in one output directory; a second run with the same options takes up what is there.

    Args:
        model_name: Hub id or directory of a plain checkpoint with its tokenizer.
        task: What to learn.
        output: Directory for `dense`, `routed` (`converted` where the recipe has no routers), `static` (each a loadable
            model), `report.md` and pictures.
        options: How to train.
        bar: Shows how far each training is, in place of what `Trainer` prints.

    Attributes:
        problem: After `run`: what is wrong with `static` when it is opened in a new process; empty where nothing is. The
            models and the report are written all the same.

    Raises:
        ValueError: The directory holds a run with other options, or the model itself; or the model does not open whole (see
            `open_model`), or is not fine-tuned on the task where `dense_epochs` is 0.
        ImportError: Routers are to be drawn, and matplotlib is not installed.
    """

    def __init__(
        self,
        model_name: str,
        task: Task,
        output: Path,
        options: WorkflowOptions,
        bar: TrainerCallback | None = None,
    ) -> None:
        self.model_name = model_name
        self.task = task
        self.output = output
        self.options = options
        self.problem = ""
        check_output(output, [model_name], ("dense", "routed", "converted", "static", "checkpoints"))
        if options.recipe.routes:
            check_drawable()
        set_seed(options.seed)
        self.source = (load_to_fine_tune if options.dense_epochs else load_fine_tuned)(model_name, task)
        check_lesson_of(options.recipe, task.kind.is_tuned)
        self.tokenizer: PreTrainedTokenizerBase = open_tokenizer(model_name, self.source)
        claim(output, {"model": model_name, **task.identity, **asdict(options)})
        self.data = task.tokenize(self.tokenizer, max_length=options.max_length, model=self.source)
        self.setup = Setup(
            self.data,
            self.tokenizer,
            output / "checkpoints",
            seed=options.seed,
            batch_size=options.batch_size,
            examples_per_epoch=options.examples_per_epoch,
            bar=bar,
        )

    def run(self, say: Callable[[str], None] = logger.info) -> Path:
        """Does the whole job; returns the path of the report."""
        say("1/4 fine-tuning the dense model")
        dense = self._stage("dense", self._train_dense)
        routes = self.options.recipe.routes
        say("2/4 converting layers" + (" and letting experts specialise" if routes else " to the heads that score best"))
        name = "routed" if routes else "converted"
        converted = self._stage(name, lambda: self._convert(dense, name))
        say("3/4 pruning, saving, opening the result in a new process")
        static = self._stage("static", lambda: self._prune(dense, converted))
        self.problem = problem_when_reopened(self.output / "static", static, self.data["test"], self.tokenizer)
        say("4/4 measuring")
        return self.report({"dense": dense, name: converted, "static": static})

    def _stage(self, name: str, make: Callable[[], PreTrainedModel]) -> PreTrainedModel:
        return kept_model(self.output / name, self.tokenizer, make)

    def _train_dense(self) -> PreTrainedModel:
        options = self.options
        return fine_tune(self.source, self.setup, options.dense_epochs, options.dense_learning_rate, name="dense")

    def _convert(self, dense: PreTrainedModel, name: str) -> PreTrainedModel:
        options, total = self.options, dense.config.num_hidden_layers
        layers = range(total - (options.num_expert_layers or total - 1), total)
        return convert(dense, layers, self.setup, options.recipe, keep=options.keep, name=name)

    def _prune(self, dense: PreTrainedModel, converted: PreTrainedModel) -> PreTrainedModel:
        # The usage in a routed model was counted on held-out rows, so a run that is taken up prunes alike.
        return recover(without_routers(converted, self.options.keep), dense, self.setup, self.options.recipe, name="static")

    def report(self, models: dict[str, PreTrainedModel]) -> Path:
        """Measures the models side by side and writes `report.md` (and `usage.png`, of routers); returns the report's path."""
        scores = {name: evaluate_on(model, self.data["test"], self.task, self.tokenizer) for name, model in models.items()}
        rows = measure_models(models, scores, self.task)
        record = RunRecord.of(
            models["static"],
            rows,
            scores,
            self.task,
            **origin(self.model_name),
            options=asdict(self.options),
            seeds=(self.options.seed,),
            training=Rows(len(self.task.train), f"training rows of {self.task.name}"),
            **expert_choice(self.options.recipe, self.task),
        )
        write_card(self.output / "static", record)
        path = self.output / "report.md"
        text = f"""# {self.task.name}: {", ".join(models)}

Base model: `{record.base_model}`. Options: `run.json`.

{f"**Not verified**: {self.problem}" if self.problem else REOPENED}

{compare_models(rows, scores, self.task)}
{self._usage(models["routed"], record) if "routed" in models else self._scored(record)}"""
        write_text(path, text)
        return path

    def _usage(self, routed: PreTrainedModel, record: RunRecord) -> str:
        plot_usage(routed.usage(), self.output / "usage.png", record.kept)
        return f"""## Usage of the experts

Share of held-out sequences in percent; the most used {self.options.keep} of each layer stayed.

```
{usage_table(routed.usage())}
```

Kept: {record.kept.kept}

![usage](usage.png)
"""

    def _scored(self, record: RunRecord) -> str:
        selector = self.options.recipe.expert_selector
        return f"""## Experts

No routers: the {self.options.keep} best heads of each layer in the dense model, by `{selector}`, are its experts.

Kept: {record.kept.kept}
"""
