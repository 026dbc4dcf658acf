"""`Compression`: measures shapes, trains candidates until the targets are met, verifies and writes the one to keep."""

import json
import logging
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, set_seed

from shrp_hf.checkpoints import open_tokenizer
from shrp_hf.measuring import CostTable, Timing, flop_table, latency_table, measure_throughput
from shrp_hf.measuring.environment import environment
from shrp_hf.models.lengths import fitting_length
from shrp_hf.plans.budget import Budget, Serving
from shrp_hf.plans.keep_plan import KeepPlan
from shrp_hf.publishing.card import CARD_NAME
from shrp_hf.publishing.plots import check_drawable
from shrp_hf.publishing.record import RECORD_NAME
from shrp_hf.publishing.report import predict_on, write_text
from shrp_hf.scoring import HeadStats
from shrp_hf.structures import cut, keep_layers, score, thin_plan, thin_reach, uniform_plan
from shrp_hf.tasks.baseline import check_learned
from shrp_hf.tasks.fine_tuned import load_fine_tuned, load_to_fine_tune
from shrp_hf.tasks.task import Task, for_json, shown
from shrp_hf.training.recipes import Setup, check_lesson_of, convert, fine_tune, recover, without_routers
from shrp_hf.workflows.compress.candidates import (
    DENSE,
    Candidate,
    Experts,
    FirstLayers,
    Measure,
    Thin,
    Uniform,
    candidates,
    possible,
    predict_speeds,
    probes,
    rungs,
    speed_table,
    table_error,
    untrained,
    worthwhile,
)
from shrp_hf.workflows.compress.options import CompressOptions
from shrp_hf.workflows.compress.search import Trial, best, check_reachable, search, share_text
from shrp_hf.workflows.compress.verdict import Verdict, write_verdict
from shrp_hf.workflows.run_directory import check_output, claim, kept_model, problem_when_reopened, save_model, saved_model

logger = logging.getLogger(__name__)

_TABLE_ERROR = 0.25
_NUM_CORRECTIONS = 2
Predict = Callable[..., EvalPrediction]
Say = Callable[[str], Any]


class Compression:
    """Compresses one model in one output directory; a second run takes up what is there and trains nothing twice.

    Everything is chosen by measured speed and by quality on the held-out rows. The reported rows only verify the result.

    Args:
        model_name: Hub id or directory of a model fine-tuned on the task, with its tokenizer; or of any encoder, with
            `dense_epochs`.
        task: Its task.
        output: Directory for `model` (the result), `report.html`, `report.md`, `trials.png`, `compress.json`, and for what
            a run that is taken up needs: `dense`, `routed`, `converted`, `trials`, `plans`, `scores.safetensors`,
            `speeds.json`.
        options: The targets, and how to train.
        measure: Times models; stands in for `measure_throughput` in tests.
        predict: Predicts rows; stands in for `predict_on` in tests.
        bar: Shows how far each training is, in place of what `Trainer` prints.

    Raises:
        ValueError: The model is not fine-tuned on this task or does not open whole, its family has none of the structures, it
            is already converted or pruned, or the directory holds another run, or the model itself.
        ImportError: matplotlib, which draws `trials.png`, is not installed.
    """

    def __init__(
        self,
        model_name: str,
        task: Task,
        output: Path,
        options: CompressOptions,
        *,
        measure: Measure = measure_throughput,
        predict: Predict = predict_on,
        bar: TrainerCallback | None = None,
    ) -> None:
        self.model_name, self.task, self.output, self.options = model_name, task, output, options
        self.measure, self.predict = measure, predict
        check_output(output, [model_name], ("model", "dense", "routed", "converted", "trials", "checkpoints"))
        check_drawable()
        set_seed(options.seed)
        self.source = (load_to_fine_tune if options.dense_epochs else load_fine_tuned)(model_name, task)
        check_lesson_of(options.recipe, task.kind.is_tuned)
        batch_size, length = options.shape
        options = replace(options, shape=(batch_size, fitting_length(length, [self.source], name="shape")))
        self.options = options
        config = self.source.config
        if config.kept_heads is not None or config.intermediate_sizes is not None or config.expert_layers:
            raise ValueError(
                f"`{model_name}` cannot be compressed: this model is already pruned or converted. Give the dense one."
            )
        self.structures = options.structures or possible(self.source, options.experts is not None)
        self.choices = candidates(self.source, self.structures, options.experts)
        for structure in self.structures:  # refuses, by name, what the family cannot be
            untrained(self.source, next((c for c in self.choices if c.structure == structure), FirstLayers(1)))
        self.tokenizer: PreTrainedTokenizerBase = open_tokenizer(model_name, self.source)
        self._claim({"model": model_name, **task.identity, **options.identity})
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

    def run(self, say: Say = logger.info, show: Say = logger.info) -> Verdict:
        """Does the whole job.

        Args:
            say: Called with a line when a step begins.
            show: Called with Markdown worth reading meanwhile.

        Raises:
            ValueError: No candidate reaches the speed-up (raised before anything is trained), or the dense model is not
                better than the majority class on the held-out rows.
        """
        options, targets = self.options, self.options.targets
        total = self.source.config.num_hidden_layers
        say(f"1/5 measuring the speed of {len(self.choices)} shapes, before anything is trained")
        speeds, reach = self._measured(show)
        say("2/5 the dense model" + (": fine-tuning" if options.dense_epochs else ""))
        quality = self._learned(show)
        say(f"3/5 training candidates: {targets}")
        speeds = self._with_planned(speeds, reach, show)
        trials = self._search(speeds, quality, show)
        chosen = best(trials, targets)
        say(f"4/5 {chosen.candidate.name} is saved: opening it in a new process")
        result = self._published(chosen.candidate)
        problem = problem_when_reopened(self.output / "model", result, self.data["test"], self.tokenizer)
        say("5/5 verifying on the reported rows")
        verdict = Verdict(self.model_name, options, total, quality, speeds, tuple(trials), chosen, problem)
        models = {DENSE: self.dense(), chosen.candidate.name: result}
        predictions = {name: self.predict(model, self.data["test"], self.tokenizer) for name, model in models.items()}
        write_verdict(verdict, self.task, self.output, models, predictions, self._timings(chosen.candidate))
        return verdict

    def _measured(self, show: Say) -> tuple[dict[Candidate, float], float]:
        """Returns the speed-ups of the shapes that need no scores, and what thin layers reach; refuses what none reaches."""
        speeds, targets = self.speeds(self.choices), self.options.targets
        if speeds:
            show(speed_table(speeds, targets.speedup))
        reach = 0.0
        if "thin" in self.structures:
            self._check_table(show)
            reach = thin_reach(self.source, self.table)
            show(f"Thin layers, by {'FLOPs' if self.table.unit == 'FLOPs' else 'the table of times'}: up to {reach:.2f}x")
        check_reachable(speeds, targets, self.source.config.num_hidden_layers, reach)
        return speeds, reach

    def _learned(self, show: Say) -> float:
        """Returns the held-out quality of the dense model; refuses one that has learned nothing."""
        headline, quality = self.task.chosen_by, self._held_out(DENSE, self.dense())
        show(f"Held-out {headline} of the dense model: {shown(quality)}")
        if not self.options.force:
            check_learned(self.task, quality, self.model_name)
        if self.options.targets.keep_quality is not None and not quality > 0:
            raise ValueError(
                f"`keep_quality` needs a dense model that has learned: its held-out {headline} is {shown(quality)}."
            )
        return quality

    def _with_planned(self, speeds: dict[Candidate, float], reach: float, show: Say) -> dict[Candidate, float]:
        """Returns the speed-ups of all candidates, planned thin layers among them where there are to be any."""
        if not reach:
            return speeds
        planned, targets = self.planned(reach), self.options.targets
        show(speed_table(planned, targets.speedup))
        speeds = {**planned, **speeds}
        check_reachable(speeds, targets, self.source.config.num_hidden_layers)
        return speeds

    def _search(self, speeds: dict[Candidate, float], quality: float, show: Say) -> list[Trial]:
        """Trains candidates; whenever one is the best so far it is in `model`, for whoever does not want to wait."""
        targets, total, headline = self.options.targets, self.source.config.num_hidden_layers, self.task.chosen_by
        done: list[Trial] = []

        def attempt(candidate: Candidate) -> Trial:
            show(f"{candidate.name}: {candidate.describe(total)}, predicted {speeds[candidate]:.2f}x")
            trial = self.attempt(candidate, quality)
            found = f"held-out {headline} {shown(trial.quality)} ({share_text(trial.retention)} of dense)"
            show(f"{candidate.name}: {trial.speedup:.2f}x, {found}")
            done.append(trial)
            if best(done, targets) is trial:
                self._published(candidate)
                show(f"{candidate.name} is the best so far: it is in `model`. Ctrl-C ends the search and keeps it.")
            return trial

        return search(worthwhile(speeds), speeds, targets, attempt, self.options.max_trials)

    def _published(self, candidate: Candidate) -> PreTrainedModel:
        """Writes a trained candidate to `model`, unless it is there, and returns it."""
        result, folder = self._load(self.output / "trials" / candidate.name), self.output / "model"
        for name in (CARD_NAME, RECORD_NAME):  # of what was there before
            (folder / name).unlink(missing_ok=True)
        save_model(result, self.tokenizer, folder)
        return result

    def speeds(self, choices: list[Candidate]) -> dict[Candidate, float]:
        """Returns the predicted speed-up of candidates; those that were not measured on this machine before are.

        Args:
            choices: The candidates.
        """
        stored = self._stored()
        known = stored.setdefault("predicted", {})
        missing = [candidate for candidate in choices if candidate.name not in known]
        if missing:
            source = self.source.to(self.options.device)
            predicted = predict_speeds(source, missing, self.options.shape, self.measure)
            known |= {candidate.name: speed for candidate, speed in predicted.items()}
            self._store(stored)
        return {candidate: known[candidate.name] for candidate in choices}

    @cached_property
    def table(self) -> CostTable:
        """What heads and neurons cost: seconds on this machine's CPU; on a GPU, where no table is measured, FLOPs."""
        at = Serving(*self.options.shape)
        return latency_table(self.source.cpu(), at) if self.options.device == "cpu" else flop_table(self.source, at)

    @cached_property
    def stats(self) -> HeadStats:
        """Scores of the dense model's heads and neurons on training rows, from one pass."""
        return score(self.dense(), self.setup, cache=self.output / "scores.safetensors")

    def _check_table(self, show: Say) -> None:
        """Compares the table of times with layers that are measured; a table that is off is measured anew.

        Where it is off again, because other work disturbs the machine, say, FLOPs take its place: what is planned by them is
        measured all the same.
        """
        if self.table.unit != "seconds":
            return
        measured = self.speeds(probes(self.source))
        off = table_error(self.table, self.source, measured)
        if off > _TABLE_ERROR:
            at = Serving(*self.options.shape)
            self.table = latency_table(self.source.cpu(), at, anew=True)
            off = table_error(self.table, self.source, measured)
            if off > _TABLE_ERROR:
                show(
                    f"The table of times misjudges what was measured by {off:.0%} (does something else run?): thin layers are "
                    "planned by FLOPs."
                )
                self.table = flop_table(self.source, at)

    def planned(self, reach: float) -> dict[Candidate, float]:
        """Plans thin layers and measures them untrained; where none is as fast as asked, also faster ones.

        Args:
            reach: The highest speed-up that the table allows.

        Returns:
            Measured speed-up of each.
        """
        wanted = self.options.targets.speedup
        speeds = self.speeds(self.searched(rungs(wanted, reach)))
        for _ in range(_NUM_CORRECTIONS):
            if wanted is None or not speeds or max(speeds.values()) >= wanted:
                break
            fastest = max(speeds, key=lambda candidate: speeds[candidate])
            too_optimistic = -fastest.size[0] / speeds[fastest]
            speeds |= self.speeds(self.searched(rungs(wanted * too_optimistic, reach)))
        return speeds

    def searched(self, speedups: list[float]) -> list[Candidate]:
        """Plans thin layers, unless they were planned before; the same plan is listed once.

        Args:
            speedups: How many times as fast, by the table.
        """
        found: dict[KeepPlan, Candidate] = {}
        for times in speedups:
            path = f"plans/{times:g}x.json"
            if self._read(path) is None:
                plan = thin_plan(self.dense(), Budget.speedup(times, table=self.table), self.stats)
                self._write(path, plan.to_json() + "\n")
            plan = KeepPlan.from_json(self._read(path))
            found.setdefault(plan, Thin(times, plan))
        return list(found.values())

    def dense(self) -> PreTrainedModel:
        """Returns the dense model, fine-tuned first if need be."""
        options = self.options

        def tune() -> PreTrainedModel:
            return fine_tune(self.source, self.setup, options.dense_epochs, options.dense_learning_rate, name=DENSE)

        return self._kept(DENSE, DENSE, tune)

    def attempt(self, candidate: Candidate, dense_quality: float) -> Trial:
        """Trains a candidate, unless it was trained before, and measures its quality and its speed.

        Args:
            candidate: Which.
            dense_quality: The dense model's metric (`Task.chosen_by`) on the held-out rows.
        """
        model = self._kept(f"trials/{candidate.name}", f"static-{candidate.name}", lambda: self._train(candidate))
        quality = self._held_out(f"trials/{candidate.name}", model)
        timings = self._timings(candidate)
        speedup = timings[candidate.name].ratio_to(timings[DENSE])
        return Trial(candidate, quality, quality / dense_quality if dense_quality > 0 else math.nan, speedup)

    def _train(self, candidate: Candidate) -> PreTrainedModel:
        dense = self.dense()
        if isinstance(candidate, Experts):
            student = self._converted(candidate)
        elif isinstance(candidate, FirstLayers):
            student = keep_layers(dense, candidate.layers(dense.config.num_hidden_layers))
        elif isinstance(candidate, Uniform):
            student = cut(dense, uniform_plan(dense, candidate.heads, candidate.neurons, self.stats), self.stats)
        elif isinstance(candidate, Thin):
            student = cut(dense, candidate.plan, self.stats)
        else:
            raise TypeError(f"{candidate!r} is no candidate that can be trained.")
        # The dense model is read anew for each training: a teacher comes back frozen.
        return recover(student, self.dense(), self.setup, self.options.recipe, name=f"static-{candidate.name}")

    def _converted(self, candidate: Experts) -> PreTrainedModel:
        recipe, layers = self.options.recipe, candidate.layers(self.source.config.num_hidden_layers)
        # One conversion with routers serves every number of experts.
        kind, shape = ("routed", str(candidate.num_layers)) if recipe.routes else ("converted", candidate.name)
        name = f"{kind}-{shape}"
        converted = self._kept(
            f"{kind}/{shape}",
            name,
            lambda: convert(self.dense(), layers, self.setup, recipe, keep=candidate.keep, name=name),
        )
        return without_routers(converted, candidate.keep)

    def _kept(self, folder: str, training: str, make: Callable[[], PreTrainedModel]) -> PreTrainedModel:
        model = kept_model(self.output / folder, self.tokenizer, make)
        shutil.rmtree(self.setup.folder / training, ignore_errors=True)  # checkpoints of a training that is over
        return model

    def _load(self, folder: Path) -> PreTrainedModel:
        return saved_model(folder)

    def _held_out(self, folder: str, model: PreTrainedModel) -> float:
        path = f"{folder}/held_out.json"
        if self._read(path) is None:
            metrics = self.task.compute_metrics(self.predict(model, self.data["validation"], self.tokenizer))
            self._write(path, json.dumps(for_json(metrics)) + "\n")
        quality = json.loads(self._read(path))[self.task.chosen_by]
        return math.nan if quality is None else quality

    def _timings(self, candidate: Candidate) -> dict[str, Timing]:
        def verified() -> dict[str, Any]:
            folders = {DENSE: self.output / DENSE, candidate.name: self.output / "trials" / candidate.name}
            models = {name: self._load(folder).to(self.options.device) for name, folder in folders.items()}
            timings = self.measure(models, *self.options.shape, num_rounds=10)
            return {name: asdict(timing) for name, timing in timings.items()}

        stored = self._stored()
        if candidate.name not in stored:
            stored[candidate.name] = verified()
            self._store(stored)
        found = stored[candidate.name]
        return {name: Timing(**{**timing, "seconds": tuple(map(tuple, timing["seconds"]))}) for name, timing in found.items()}

    def _stored(self) -> dict[str, Any]:
        """Returns what `speeds.json` holds; nothing where it is of another machine."""
        machine = {name: value for name, value in environment().items() if name in ("machine", "gpu", "torch")}
        machine["threads"] = str(torch.get_num_threads())
        stored = json.loads(self._read("speeds.json") or "{}")
        return stored if stored.get("on") == machine else {"on": machine}

    def _store(self, stored: dict[str, Any]) -> None:
        self._write("speeds.json", json.dumps(stored) + "\n")

    # --- the directory, which a preview leaves as it is ---

    def _claim(self, identity: dict[str, Any]) -> None:
        claim(self.output, identity)

    def _read(self, name: str) -> str | None:
        """The text of a file in the directory; None where there is none."""
        path = self.output / name
        return path.read_text(encoding="utf-8") if path.exists() else None

    def _write(self, name: str, text: str) -> None:
        path = self.output / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
