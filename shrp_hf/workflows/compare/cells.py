"""What a job does: fine-tune, score, plan, convert, shorten, recover, and the record of a cell."""

import copy
import json
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import PreTrainedModel, set_seed

from shrp_hf._version import __version__
from shrp_hf.checkpoints import open_tokenizer
from shrp_hf.defaults import (
    BATCH_SIZE,
    CALIBRATION_SAMPLES,
    DENSE_LEARNING_RATE,
    DSP_EPOCHS,
    MAX_LENGTH,
    MIN_HEADS_PER_LAYER,
    SEED,
    SERVED_SHAPE,
    SIGNATURE_SIZE,
    TOLERANCE,
)
from shrp_hf.measuring import CostTable, count_flops, count_parameters, latency_table
from shrp_hf.models.lengths import num_positions
from shrp_hf.plans.budget import Budget, Serving
from shrp_hf.plans.keep_plan import KeepPlan
from shrp_hf.pruning import masked_heads, prune_heads
from shrp_hf.publishing.report import predict_on, write_text
from shrp_hf.scoring import HeadStats, StatsRequest, collect_head_stats
from shrp_hf.selectors import SELECTORS
from shrp_hf.selectors.dsp import DspCallback
from shrp_hf.structures import cut, keep_layers, spread_layers, thin_plan, thin_reach
from shrp_hf.tasks.baseline import baseline_of
from shrp_hf.tasks.fine_tuned import load_fine_tuned, load_to_fine_tune
from shrp_hf.tasks.task import Task, for_json
from shrp_hf.training.recipes import Setup, convert, fine_tune, recover, without_routers
from shrp_hf.training.sampling import RowCollator, calibration_batches
from shrp_hf.training.trainer import ShrpTrainer
from shrp_hf.workflows.compare.grid import DSP_MODES, STATISTICS, Job
from shrp_hf.workflows.run_directory import save_model, saved_model


@dataclass(frozen=True)
class Settings:
    """What holds for every cell of one output directory.

    Args:
        model: Hub id or directory of the dense model, with its tokenizer.
        dense_epochs: 0: the model is fine-tuned and serves all seeds. More: it is fine-tuned once per seed.
        dense_learning_rate: Of that fine-tuning.
        examples_per_epoch: Training examples that count as an epoch, drawn from the whole training set; None: all.
        batch_size: Sequences per training step.
        max_length: Longest sequence in tokens.
        calibration_samples: Training rows that heads are scored on.
        signature_size: Side of CAHP's resized attention maps.
        min_heads_per_layer: Heads that every layer keeps.
        alpha: Weight of importance in HIES; None: searched on the held-out rows, for each cell.
        dsp_epochs: Epochs in which DSP learns what to keep, before the recovery that every method gets.
        tolerance: Regression: how far a prediction may be from the dense model's and count as the same.
        bf16: Train in bfloat16 autocast; everything is evaluated in float32.
        split_seed: Of the held-out cut of the task.

    Raises:
        ValueError: A number is out of range.
    """

    model: str
    dense_epochs: float = 0.0
    dense_learning_rate: float = DENSE_LEARNING_RATE
    examples_per_epoch: int | None = None
    batch_size: int = BATCH_SIZE
    max_length: int = MAX_LENGTH
    calibration_samples: int = CALIBRATION_SAMPLES
    signature_size: int = SIGNATURE_SIZE
    min_heads_per_layer: int = MIN_HEADS_PER_LAYER
    alpha: float | None = 0.5
    dsp_epochs: float = DSP_EPOCHS
    tolerance: float = TOLERANCE
    bf16: bool = False
    split_seed: int = SEED

    def __post_init__(self) -> None:
        for name in ("examples_per_epoch", "batch_size", "max_length", "calibration_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        for name in ("dense_epochs", "min_heads_per_layer", "tolerance", "split_seed"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"`{name}` must be 0 or more, got {getattr(self, name)}.")
        for name in ("dense_learning_rate", "dsp_epochs"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"`{name}` must be more than 0, got {getattr(self, name)}.")
        if self.alpha is not None and not 0 <= self.alpha < 1:
            raise ValueError(f'`alpha` must be in [0, 1) or "search", got {self.alpha}.')


class Worker:
    """Does the jobs of a comparison in its directory.

    Args:
        settings: What holds for every cell.
        task: What the model does.
        output: The directory.

    Raises:
        ValueError: The model does not open whole, or is not fine-tuned on the task where `dense_epochs` is 0.
    """

    def __init__(self, settings: Settings, task: Task, output: Path) -> None:
        self.settings = settings
        self.task = task
        self.output = output
        opened = (load_to_fine_tune if settings.dense_epochs else load_fine_tuned)(settings.model, task)
        self.tokenizer = open_tokenizer(settings.model, opened)
        self.data = task.tokenize(self.tokenizer, max_length=settings.max_length, model=opened)
        self.task_identity = task.identity

    def file(self, job_or_key: Job | str, is_cell: bool | None = None) -> Path:
        """The file that says that a job is done."""
        key = job_or_key.key if isinstance(job_or_key, Job) else job_or_key
        is_cell = job_or_key.is_cell if isinstance(job_or_key, Job) else is_cell
        return self.output / ("cells" if is_cell else "parts") / f"{key}.json"

    def is_done(self, job: Job) -> bool:
        """Whether its file is there, and the model that it speaks of."""
        if not self.file(job).exists():
            return False
        makes_model = bool(self.settings.dense_epochs) if job.kind == "dense" else job.makes_model
        return not makes_model or (self._folder(job.key) / "config.json").exists()

    def do(self, job: Job) -> None:
        """Does a job and writes its file."""
        set_seed(job.seed)
        start = time.perf_counter()
        record = getattr(self, f"_do_{job.kind}")(job)
        record = {
            "key": job.key,
            "seed": job.seed,
            **job.fields,
            "recipe": job.recipe and job.recipe.name,
            **record,
            "seconds": round(time.perf_counter() - start, 1),
            "settings": self.identity(job),
            "versions": {"shrp_hf": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
        }
        self.file(job).parent.mkdir(parents=True, exist_ok=True)
        write_text(self.file(job), json.dumps(record, indent=1) + "\n")

    def identity(self, job: Job) -> dict[str, Any]:
        """What a job's result depends on beside its key: a directory in which these differ is refused."""
        return {**self.task_identity, **asdict(self.settings), "recipe": job.recipe and asdict(job.recipe)}

    # --- the kinds of jobs ---

    def _do_dense(self, job: Job) -> dict[str, Any]:
        settings = self.settings
        examples = 0
        if settings.dense_epochs:
            setup = self.setup(job)
            model = load_to_fine_tune(settings.model, self.task)
            model = fine_tune(model, setup, settings.dense_epochs, settings.dense_learning_rate, name=job.key)
            examples = self._num_examples(setup, settings.dense_epochs)
            self._save(model, job.key)
        model = self._dense(job.seed)
        logits = self._logits(model, "test")
        predictions = self.task.decide(logits).tolist()
        measured = self._measured(model, logits, np.array(predictions))
        blind = {
            name: baseline_of(self.task, rows)
            for name, rows in (("metrics", self.task.test), ("held_out", self.task.validation))
        }
        values = {split: for_json(found.metrics) for split, found in blind.items()}
        baseline = {"name": blind["metrics"].name, **values}
        return {**measured, "train_examples": examples, "predictions": predictions, "baseline": baseline}

    def _do_stats(self, job: Job) -> dict[str, Any]:
        request = StatsRequest(importance=True, entropy=True)
        if job.fields["statistics"] == "signatures":
            request = StatsRequest(salience=True, signature_size=self.settings.signature_size)
        elif job.fields["statistics"] == "neurons":
            request = StatsRequest(importance=True, neurons=True, means=True)
        count, batch_size = self.settings.calibration_samples, self.settings.batch_size
        batches = calibration_batches(self.data["train"], self.tokenizer, count, batch_size=batch_size, seed=job.seed)
        path = self._stats_file(job.fields["statistics"], job.seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        model = self._dense(job.seed)
        collect_head_stats(model.to("cuda" if torch.cuda.is_available() else "cpu"), batches, request, cache=path)
        return {"rows": len(batches.dataset)}

    def _do_plan(self, job: Job) -> dict[str, Any]:
        method, budget, value = (job.fields[name] for name in ("method", "budget", "value"))
        dense = self._dense(job.seed)
        if budget == "knee_degree" and method != "cahp":
            budget, value = "heads", self._part(f"plan-cahp-knee{value}-seed{job.seed}")["num_kept"]
        if method in DSP_MODES:
            return self._learned_plan(job, dense, budget, value)
        if method == "thin":
            stats = HeadStats.load(self._stats_file("neurons", job.seed))
            spent = Budget.speedup(value, table=self._table(dense)) if budget == "speedup" else Budget.fraction(value)
            return _planned(thin_plan(dense, spent, stats, uniform=budget == "share"), stats.importance())
        budgets = {"keep": Budget.fraction, "heads": Budget.heads, "knee_degree": Budget.knee}
        options: dict[str, Any] = {"min_heads_per_layer": self.settings.min_heads_per_layer}
        taken = {field.name for field in fields(SELECTORS[method])}
        available = {"seed": job.seed, "signature_size": self.settings.signature_size}
        options |= {name: value for name, value in available.items() if name in taken}
        if method == "hies":
            options["alpha"] = "search" if self.settings.alpha is None else self.settings.alpha
            options["evaluate"] = partial(self._quality, dense)
        selector = SELECTORS[method](budget=budgets[budget](value), **options)
        statistics = STATISTICS.get(method)
        stats = HeadStats.load(self._stats_file(statistics, job.seed)) if statistics else None
        plan = selector.select(dense, stats=stats)
        found = {"alpha": getattr(selector, "best_alpha", None)} if method == "hies" else {}
        return {**_planned(plan, selector.scores), **found}

    def _learned_plan(self, job: Job, dense: PreTrainedModel, budget: str, value: float) -> dict[str, Any]:
        """DSP: trains a copy, whose weights go with the plan where they have changed."""
        config = dense.config
        available = config.num_hidden_layers * config.num_attention_heads
        count = Budget.fraction(value).count(available) if budget == "keep" else int(value)
        mode = DSP_MODES[job.fields["method"]]
        least = self.settings.min_heads_per_layer
        dsp = DspCallback(count, mode, seed=job.seed, min_heads_per_layer=least)
        setup = self.setup(job)
        args = setup.arguments(
            job.key,
            num_train_epochs=self.settings.dsp_epochs * setup.epoch,
            learning_rate=job.recipe.recovery_learning_rate,
            **job.recipe.control.arguments,  # what heads are worth to the task, which its labels tell
        )
        trainer = ShrpTrainer(
            self._dense(job.seed),
            args,
            data_collator=RowCollator(self.tokenizer),
            train_dataset=self.data["train"],
            processing_class=self.tokenizer,
            teacher=dense if job.recipe.distils else None,
            callbacks=[dsp],
        )
        model = setup.train(trainer)
        if mode == "joint":
            self._save(model, job.key)
        examples = self._num_examples(setup, self.settings.dsp_epochs)
        return {**_planned(dsp.plan, dsp.importances), "train_examples": examples}

    def _do_convert(self, job: Job) -> dict[str, Any]:
        dense, setup, recipe = self._dense(job.seed), self.setup(job), job.recipe
        total = dense.config.num_hidden_layers
        layers = range(total - job.fields["layers"], total)
        model = convert(dense, layers, setup, recipe, keep=job.fields.get("experts", 1), name=job.key)
        self._save(model, job.key)
        return {"train_examples": self._num_examples(setup, recipe.conversion_epochs(len(layers)))}

    def _do_shorten(self, job: Job) -> dict[str, Any]:
        dense, setup, count = self._dense(job.seed), self.setup(job), job.fields["layers"]
        # As many examples as the conversion of the layers that are gone.
        total = dense.config.num_hidden_layers
        epochs = job.recipe.conversion_epochs(total - count)
        short = keep_layers(dense, spread_layers(total, count) if job.fields.get("spread") else range(count))
        model = recover(short, dense, setup, replace(job.recipe, recovery_epochs=epochs), name=job.key)
        self._save(model, job.key)
        return {"train_examples": self._num_examples(setup, epochs)}

    def _do_control(self, job: Job) -> dict[str, Any]:
        dense = self._dense(job.seed)
        return {**self._recovered(job, copy.deepcopy(dense), dense), "part_seconds": 0.0}

    def _do_cell(self, job: Job) -> dict[str, Any]:
        dense, part = self._dense(job.seed), self._part(job.needs[1])
        model, found = self._cut(job, dense, part)
        recovered = self._recovered(job, model, dense, part.get("train_examples", 0))
        return {**recovered, **found, "part_seconds": part["seconds"]}

    def _recovered(self, job: Job, model: PreTrainedModel, dense: PreTrainedModel, examples: int = 0) -> dict[str, Any]:
        """Trains `model` as the job says; returns what it reaches then, `examples` being those that it has seen."""
        epochs = job.fields["recovery_epochs"]
        if epochs:
            setup = self.setup(job)
            model = recover(model, dense, setup, replace(job.recipe, recovery_epochs=epochs), name=job.key)
            examples += self._num_examples(setup, epochs)
        predictions = json.loads(self.file(job.needs[0], True).read_text(encoding="utf-8"))["predictions"]
        measured = self._measured(model, self._logits(model, "test"), np.array(predictions))
        return {**measured, "train_examples": examples}

    def _cut(self, job: Job, dense: PreTrainedModel, part: Mapping[str, Any]) -> tuple[PreTrainedModel, dict[str, Any]]:
        if part["key"].startswith("shorten"):
            return self._saved(part["key"]), {}
        if part["key"].startswith("convert"):
            return without_routers(self._saved(part["key"]), job.fields["experts"]), {}
        plan = KeepPlan(part["kept"], part["num_heads"], part.get("neurons"), part.get("num_neurons"))
        if job.fields["method"] == "thin":
            return cut(dense, plan, HeadStats.load(self._stats_file("neurons", job.seed))), {}
        source = self._saved(part["key"]) if job.fields["method"] == "dsp" else dense
        return prune_heads(source, plan), {"alpha": part.get("alpha")}

    # --- what they share ---

    def setup(self, job: Job) -> Setup:
        """What the trainings of a job share."""
        settings = self.settings
        return Setup(
            self.data,
            self.tokenizer,
            self.output / "checkpoints",
            seed=job.seed,
            batch_size=settings.batch_size,
            examples_per_epoch=settings.examples_per_epoch,
            bf16=settings.bf16,
            resumable=False,  # a cell that was killed begins anew: its result is that of an undisturbed run
        )

    def _num_examples(self, setup: Setup, epochs: float) -> int:
        return round(epochs * setup.epoch * len(self.data["train"]))

    def check_thin(self, times: float) -> None:
        """Refuses a speed-up that thin layers do not reach, by the table of times, which is measured unless it is there.

        Args:
            times: The speed-up.

        Raises:
            ValueError: Names what can be reached.
        """
        open_model = load_to_fine_tune if self.settings.dense_epochs else load_fine_tuned
        dense = open_model(self.settings.model, self.task)
        reach = thin_reach(dense, self._table(dense))
        if times > reach:
            raise ValueError(f"`thin` {times:g} is out of reach on this machine: thin layers run up to {reach:.2f}x as fast.")

    def _table(self, dense: PreTrainedModel) -> CostTable:
        batch_size, length = SERVED_SHAPE
        return latency_table(dense, Serving(batch_size, min(length, num_positions(dense) or length)))

    def _folder(self, key: str) -> Path:
        return self.output / "models" / key

    def _stats_file(self, statistics: str, seed: int) -> Path:
        return self.output / "stats" / f"{statistics}-seed{seed}.safetensors"

    def _part(self, key: str) -> dict[str, Any]:
        return json.loads(self.file(key, False).read_text(encoding="utf-8"))

    def _save(self, model: PreTrainedModel, key: str) -> None:
        save_model(model, self.tokenizer, self._folder(key))

    def _saved(self, key: str) -> PreTrainedModel:
        return saved_model(self._folder(key))

    def _dense(self, seed: int) -> PreTrainedModel:
        """The dense model of a seed, read anew for each job: a trainer freezes the teacher that it is given."""
        if self.settings.dense_epochs:
            return self._saved(f"dense-seed{seed}")
        return load_fine_tuned(self.settings.model, self.task)

    def _logits(self, model: PreTrainedModel, split: str) -> transformers.EvalPrediction:
        return predict_on(model, self.data[split], self.tokenizer)

    def _quality(self, model: PreTrainedModel, plan: KeepPlan) -> float:
        with masked_heads(model, plan):
            return self.task.compute_metrics(self._logits(model, "validation"))[self.task.chosen_by]

    def _measured(self, model: PreTrainedModel, prediction: transformers.EvalPrediction, dense: np.ndarray) -> dict[str, Any]:
        task, config = self.task, model.config
        decided = task.decide(prediction)
        is_same = np.abs(decided - dense) <= self.settings.tolerance if task.kind.is_continuous else decided == dense
        is_same = is_same.reshape(len(decided), -1).all(axis=-1)
        batch_size, length = SERVED_SHAPE
        length = min(length, num_positions(model) or length)
        kept = [config.heads_of(i) for i in range(config.num_hidden_layers)]
        return {
            "auto": task.kind.auto,
            "kept": kept,
            "expert_layers": config.expert_layers,
            "neurons": config.intermediate_sizes,
            "ffn_width": config.ffn_width,
            "num_heads": sum(len(heads) for i, heads in enumerate(kept) if i not in config.expert_layers),
            "num_experts": sum(len(kept[i]) for i in config.expert_layers),
            "metrics": for_json(task.compute_metrics(prediction)),
            "held_out": for_json(task.compute_metrics(self._logits(model, "validation"))),
            "rows": task.num_reported,
            "correct": int((decided == prediction.label_ids).sum()) if task.kind.has_classes else None,
            "agreement": float(is_same.mean()),
            "num_agreeing": int(is_same.sum()),
            "parameters": asdict(count_parameters(model)),
            "flops": count_flops(model, batch_size, length),
            "flops_shape": [batch_size, length],
        }


def _planned(plan: KeepPlan, scores: torch.Tensor) -> dict[str, Any]:
    listed = for_json(scores.tolist())
    neurons = {} if plan.neurons is None else {"neurons": plan.neurons, "num_neurons": plan.num_neurons}
    return {
        "kept": [list(heads) for heads in plan.kept],
        "num_heads": plan.num_heads,
        "num_kept": plan.num_kept,
        "scores": listed,
        **neurons,
    }
