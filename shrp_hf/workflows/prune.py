"""Post-hoc pruning end to end: score, choose, cut, recover, save, report."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, set_seed

from shrp_hf.checkpoints import open_tokenizer
from shrp_hf.defaults import (
    BATCH_SIZE,
    CALIBRATION_SAMPLES,
    MAX_LENGTH,
    MIN_HEADS_PER_LAYER,
    SEED,
    SERVED_SHAPE,
    SIGNATURE_SIZE,
)
from shrp_hf.measuring.markdown import markdown_table
from shrp_hf.models.slicing import OutputMeans
from shrp_hf.plans.budget import Budget, Serving
from shrp_hf.plans.keep_plan import KeepPlan
from shrp_hf.pruning import masked_heads, prune_heads
from shrp_hf.publishing.card import write_card
from shrp_hf.publishing.plots import check_drawable, plot_clusters, plot_head_map, plot_knee
from shrp_hf.publishing.record import Rows, RunRecord, origin, source_name
from shrp_hf.publishing.report import compare_models, evaluate_on, measure_models, write_text
from shrp_hf.scoring import StatsRequest, collect_head_stats
from shrp_hf.selectors import SELECTORS, CahpSelector, HeadClusterSelector, Selector
from shrp_hf.tasks.fine_tuned import load_fine_tuned
from shrp_hf.tasks.task import Task
from shrp_hf.training.recipes import Setup, check_lesson_of, find_recipe, recover
from shrp_hf.training.sampling import calibration_batches
from shrp_hf.workflows.run_directory import check_output, save_model


@dataclass(frozen=True)
class PruneOptions:
    """How a fine-tuned model is pruned after the fact. Exactly one of keep to knee_degree.

    Args:
        selector: A name in `SELECTORS`.
        keep: Share of the heads that stay, and of the neurons where they may go.
        heads: Number of heads that stay.
        speedup: How many times as fast the model becomes, by the time of its layers on this machine; heads and neurons go.
        keep_latency: The same as a share of the unpruned model's time.
        keep_flops: Share of the unpruned model's FLOPs; heads and neurons go.
        keep_parameters: Share of the unpruned model's parameters, embeddings included.
        keep_quality: Share of the unpruned quality that stays, measured on held-out rows.
        knee_degree: Polynomial degree of CAHP's knee.
        neurons: Whether FFN neurons may go; None: with a speed-up, a latency or FLOPs.
        shape: (batch, length) that times and FLOPs are of.
        runtime: What times are of: "eager", "onnx" or "int8".
        threads: CPU threads that times are of; None: torch's setting.
        alpha: Weight of importance in HIES.
        signature_size: Side of CAHP's resized attention maps: 32 for short sentences, 48 for pairs in the paper.
        calibration_samples: Training rows to score on; CAHP's paper takes all, HIES' 32.
        per_layer: Spread the heads evenly over the layers.
        min_heads_per_layer: Heads that every layer keeps.
        output_means: What is cut leaves its mean contribution, on the calibration rows, in the output bias.
        recovery_epochs: Epochs of training after the cut (CAHP: 3).
        learning_rate: Of that training; None: the recipe's own.
        recipe: How it is trained then, a name in `RECIPES`.
        teacher: Hub id or directory of the model that teaches then, where the recipe says so; None: the unpruned model.
        bf16: Recover in bfloat16 autocast.
        batch_size: Sequences per batch.
        max_length: Longest sequence in tokens.
        seed: Seed of everything that is drawn.
    """

    selector: str = "hies"
    keep: float | None = None
    heads: int | None = None
    speedup: float | None = None
    keep_latency: float | None = None
    keep_flops: float | None = None
    keep_parameters: float | None = None
    keep_quality: float | None = None
    knee_degree: int | None = None
    neurons: bool | None = None
    shape: tuple[int, int] = SERVED_SHAPE
    runtime: str = "eager"
    threads: int | None = None
    alpha: float | None = None
    signature_size: int = SIGNATURE_SIZE
    calibration_samples: int = CALIBRATION_SAMPLES
    per_layer: bool = False
    min_heads_per_layer: int = MIN_HEADS_PER_LAYER
    output_means: bool = True
    recovery_epochs: float = 0.0
    learning_rate: float | None = None
    recipe: str = "default"
    teacher: str | None = None
    bf16: bool = False
    batch_size: int = BATCH_SIZE
    max_length: int = MAX_LENGTH
    seed: int = SEED

    def make_selector(self, quality: Callable[[KeepPlan], float]) -> Selector:
        """Builds the selector with its budget.

        Raises:
            ValueError: The name is unknown, not exactly one budget is given, or an option does not suit the selector.
        """
        if self.selector not in SELECTORS:
            raise ValueError(f"`selector` must be one of {', '.join(sorted(SELECTORS))}, got {self.selector!r}.")
        at = Serving(*self.shape, self.runtime, self.threads)
        budgets = {
            "keep": lambda: Budget.fraction(self.keep),
            "heads": lambda: Budget.heads(self.heads),
            "speedup": lambda: Budget.speedup(self.speedup, at=at),
            "keep_latency": lambda: Budget.latency(keep=self.keep_latency, at=at),
            "keep_flops": lambda: Budget.flops(keep=self.keep_flops, at=at),
            "keep_parameters": lambda: Budget.parameters(keep=self.keep_parameters),
            "keep_quality": lambda: Budget.quality(quality, keep=self.keep_quality),
            "knee_degree": lambda: Budget.knee(self.knee_degree),
        }
        given = [name for name in budgets if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"Give exactly one of {', '.join(f'`{name}`' for name in budgets)}, got {given or 'none'}.")
        kwargs: dict[str, Any] = {"budget": budgets[given[0]](), "min_heads_per_layer": self.min_heads_per_layer}
        kwargs |= {"neurons": self.neurons, "per_layer": self.per_layer}
        taken = {field.name for field in fields(SELECTORS[self.selector])}
        kwargs |= {name: getattr(self, name) for name in ("seed", "signature_size") if name in taken}
        if self.alpha is not None:
            if self.selector != "hies":
                raise ValueError(f"`alpha={self.alpha}` belongs to the selector hies, not to {self.selector!r}.")
            kwargs["alpha"] = self.alpha
        return SELECTORS[self.selector](**kwargs)


def prune_posthoc(
    model_name: str,
    task: Task,
    output: Path,
    options: PruneOptions,
    say: Callable[[str], None] = lambda text: None,
    bar: TrainerCallback | None = None,
) -> Path:
    """Prunes a fine-tuned model and writes the smaller model, its plan, a report and pictures.

    Args:
        model_name: Hub id or directory of the fine-tuned model, with its tokenizer.
        task: Its task; scores come from training rows, measured budgets from held-out rows, the report from the rest.
        output: Directory for the model, `plan.json`, `scores.safetensors`, `report.md`, `heads.png`.
        options: How.
        say: Called with a line when a step begins.
        bar: Shows how far the recovery is, in place of what `Trainer` prints.

    Returns:
        Path of the report.

    Raises:
        ValueError: An option is out of range or does not suit the selector, a teacher or a learning rate
            would change nothing, a model was not
            fine-tuned on this task or does not open whole, or `output` is the model's own directory.
        ImportError: matplotlib, which draws the pictures, is not installed.
    """
    check_drawable()
    recipe = find_recipe(options.recipe, recovery_epochs=options.recovery_epochs, recovery_learning_rate=options.learning_rate)
    if options.teacher is not None and not (options.recovery_epochs and recipe.distils):
        raise ValueError(
            f"`teacher` {options.teacher!r} would teach nothing: give `recovery_epochs`, and a recipe in which the model is "
            f"taught (default), got recovery_epochs={options.recovery_epochs:g} and recipe={options.recipe!r}."
        )
    if options.learning_rate is not None and not options.recovery_epochs:
        raise ValueError(
            f"`learning_rate` {options.learning_rate:g} would change nothing, for nothing is trained: give `recovery_epochs`."
        )
    check_output(output, [model_name, options.teacher], ("checkpoints",))
    set_seed(options.seed)
    check_lesson_of(recipe, task.kind.is_tuned)
    model = load_fine_tuned(model_name, task)
    tokenizer = open_tokenizer(model_name, model)
    teacher = model
    if options.teacher is not None:
        teacher = load_fine_tuned(options.teacher, task)
        if open_tokenizer(options.teacher, teacher).get_vocab() != tokenizer.get_vocab():
            raise ValueError(
                f"`teacher` {options.teacher!r} has another vocabulary than {model_name!r}: it would teach by the tokens "
                "of another model. Give one with the same tokenizer."
            )
    data = task.tokenize(tokenizer, max_length=options.max_length, model=model)

    means: OutputMeans | None = None

    def quality(plan: KeepPlan) -> float:
        with masked_heads(model, plan, means):
            return evaluate_on(model, data["validation"], task, tokenizer)[task.chosen_by]

    selector = options.make_selector(quality)
    selector.check(model)
    output.mkdir(parents=True, exist_ok=True)
    say(f"1/3 scoring with {options.selector} on {min(options.calibration_samples, len(data['train']))} rows")
    batches = calibration_batches(
        data["train"], tokenizer, options.calibration_samples, batch_size=options.batch_size, seed=options.seed
    )
    request = selector.request | StatsRequest(means=options.output_means and not model.config.is_routed)
    stats = None
    if request != StatsRequest():
        stats = collect_head_stats(model, batches, request, cache=output / "scores.safetensors")
        means = stats.output_means() if request.means else None
    plan = selector.select(model, stats=stats)
    plan.to_json(output / "plan.json")

    say(f"2/3 cutting: {_kept(plan)} stay")
    pruned = prune_heads(model, plan, means)
    if options.recovery_epochs:
        setup = Setup(
            data,
            tokenizer,
            output / "checkpoints",
            seed=options.seed,
            batch_size=options.batch_size,
            bf16=options.bf16,
            resumable=False,
            bar=bar,
        )
        pruned = recover(pruned, teacher, setup, recipe)
    save_model(pruned, tokenizer, output)

    say("3/3 measuring")
    models = {"unpruned": model, "pruned": pruned}
    scores = {name: evaluate_on(m, data["test"], task, tokenizer) for name, m in models.items()}
    rows = measure_models(models, scores, task)
    source = f"training rows of {task.name}"
    chosen = asdict(options) | {"teacher": options.teacher and source_name(options.teacher)}
    num_scored = min(options.calibration_samples, len(data["train"]))
    record = RunRecord.of(
        pruned,
        rows,
        scores,
        task,
        method=options.selector,
        **origin(model_name),
        options={name: value for name, value in chosen.items() if value is not None},
        seeds=(options.seed,),
        training=Rows(len(data["train"]), source) if options.recovery_epochs else None,
        calibration=None if stats is None else Rows(num_scored, source),
    )
    write_card(output, record)
    return _report(output, record, task, selector, plan, compare_models(rows, scores, task))


def _kept(plan: KeepPlan) -> str:
    heads = f"{plan.num_kept} of {plan.num_layers * plan.num_heads} heads"
    return heads if plan.neurons is None else f"{heads} and {plan.num_kept_neurons:,} neurons"


def _layers(plan: KeepPlan) -> str:
    if plan.neurons is None:
        return "Head pruning alone saves little: half the heads of BERT-base are 13% of its parameters and 18% of its FLOPs."
    counts = enumerate(zip(plan.kept, plan.neurons, strict=True))
    return markdown_table(("layer", "heads", "neurons"), ((str(i), str(len(h)), str(len(n))) for i, (h, n) in counts), 0)


def _report(output: Path, record: RunRecord, task: Task, selector: Selector, plan: KeepPlan, comparison: str) -> Path:
    plot_head_map(selector.scores, plan, output / "heads.png")
    pictures = "![heads](heads.png)\n"
    if isinstance(selector, CahpSelector):
        kept = [i for i, (layer, head) in enumerate(selector.rows) if head in plan.kept[layer]]
        labels = selector.labels.tolist()
        medoids = selector.medoids.tolist()
        plot_clusters(selector.points.tolist(), labels, medoids, kept, output / "clusters.png")
        pictures += "![clusters](clusters.png)\n"
    if isinstance(selector, HeadClusterSelector) and "knee_degree" in record.options:
        ks, mss = zip(*selector.curve, strict=True)
        plot_knee(ks, mss, len(selector.medoids), output / "knee.png")
        pictures += "![knee](knee.png)\n"
    text = f"""# {task.name}: {record.method}

{_kept(plan)} stay. Options: `{json.dumps(record.options)}`

{comparison}
{_layers(plan)}

{pictures}"""
    path = output / "report.md"
    write_text(path, text)
    return path
