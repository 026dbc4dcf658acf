"""`Compression`: measures shapes, trains candidates until the targets are met, verifies and writes the one to keep."""

import json
import logging
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from shrp_hf.benchmark import Timing, measure_throughput
from shrp_hf.compress.candidates import (
    DENSE,
    Candidate,
    Measure,
    candidates,
    predict_speeds,
    speed_table,
    untrained,
    worthwhile,
)
from shrp_hf.compress.options import CompressOptions
from shrp_hf.compress.search import Trial, best, check_reachable, search, share_text
from shrp_hf.compress.verdict import Verdict, write_verdict
from shrp_hf.environment import environment
from shrp_hf.lengths import fitting_length
from shrp_hf.models.safe_weights import load_safely
from shrp_hf.recipes import Setup, convert, fine_tune, recover, without_routers
from shrp_hf.report import predict_on, write_text
from shrp_hf.runs import check_reopened, claim, kept_model
from shrp_hf.surgery import to_shrp
from shrp_hf.tasks.baseline import check_learned
from shrp_hf.tasks.task import Task, for_json, shown

logger = logging.getLogger(__name__)

Predict = Callable[..., EvalPrediction]
Say = Callable[[str], Any]


class Compression:
    """Compresses one model in one output directory; a second run takes up what is there and trains nothing twice.

    Everything is chosen by measured speed and by quality on the held-out rows. The reported rows only verify the result.

    Args:
        model_name: Hub id or directory of a classifier or regressor fine-tuned on the task, with its tokenizer; or of any
            encoder, with `dense_epochs`.
        task: Its task.
        output: Directory for `model` (the result), `report.md`, `trials.png`, `compress.json`, and for what a run that is
            taken up needs: `dense`, `routed`, `trials`, `speeds.json`.
        options: The targets, and how to train.
        measure: Times models; stands in for `measure_throughput` in tests.
        predict: Predicts rows; stands in for `predict_on` in tests.

    Raises:
        ValueError: The model is not fine-tuned on this task, its family has no expert layers, it is already converted or
            pruned, or the directory holds another run.
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
    ) -> None:
        self.model_name, self.task, self.output, self.options = model_name, task, output, options
        self.measure, self.predict = measure, predict
        set_seed(options.seed)
        self.source = load_source(model_name, task, fine_tuned=not options.dense_epochs)
        batch_size, length = options.shape
        options = replace(options, shape=(batch_size, fitting_length(length, [self.source], name="shape")))
        self.options = options
        self.choices = candidates(self.source.config, options.experts)
        untrained(self.source, self.choices[0])  # refuses, by name, what cannot be converted
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(model_name)
        claim(output, {"model": model_name, **task.identity, **options.identity})
        self.data = task.tokenize(self.tokenizer, max_length=options.max_length, model=self.source)
        self.setup = Setup(
            self.data,
            self.tokenizer,
            output / "checkpoints",
            seed=options.seed,
            batch_size=options.batch_size,
            examples_per_epoch=options.examples_per_epoch,
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
        speeds = self.speeds()
        show(speed_table(speeds, targets.speedup))
        check_reachable(speeds, targets, total)
        say("2/5 the dense model" + (": fine-tuning" if options.dense_epochs else ""))
        headline, quality = self.task.headline, self._held_out(DENSE, self.dense())
        show(f"Held-out {headline} of the dense model: {shown(quality)}")
        if not options.force:
            check_learned(self.task, quality, self.model_name)
        if targets.keep_quality is not None and not quality > 0:
            raise ValueError(
                f"`keep_quality` needs a dense model that has learned: its held-out {headline} is {shown(quality)}."
            )
        say(f"3/5 training candidates: {targets}")

        def attempt(candidate: Candidate) -> Trial:
            show(f"{candidate.name}: {candidate.describe(total)}, predicted {speeds[candidate]:.2f}x")
            trial = self.attempt(candidate, quality)
            found = f"held-out {headline} {shown(trial.quality)} ({share_text(trial.retention)} of dense)"
            show(f"{candidate.name}: {trial.speedup:.2f}x, {found}")
            return trial

        trials = search(worthwhile(speeds), speeds, targets, attempt, options.max_trials)
        chosen = best(trials, targets)
        say(f"4/5 saving {chosen.candidate.name}, opening it in a new process")
        result = self._load(self.output / "trials" / chosen.candidate.name)
        self.tokenizer.save_pretrained(self.output / "model")
        result.save_pretrained(self.output / "model", with_code=True)
        check_reopened(self.output / "model", result, self.data["test"], self.tokenizer)
        say("5/5 verifying on the reported rows")
        verdict = Verdict(self.model_name, options, total, quality, speeds, tuple(trials), chosen)
        models = {DENSE: self.dense(), chosen.candidate.name: result}
        predictions = {name: self.predict(model, self.data["test"], self.tokenizer) for name, model in models.items()}
        write_verdict(verdict, self.task, self.output, models, predictions, self._timings(chosen.candidate))
        return verdict

    def speeds(self) -> dict[Candidate, float]:
        """Returns the predicted speed-up of every candidate, measured unless it was measured on this machine before."""
        source = self.source.to(self.options.device)

        def predicted() -> dict[str, float]:
            speeds = predict_speeds(source, self.choices, self.options.shape, self.measure)
            return {candidate.name: speed for candidate, speed in speeds.items()}

        stored = self._measured("predicted", predicted)
        return {candidate: stored[candidate.name] for candidate in self.choices}

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
            dense_quality: The dense model's headline metric on the held-out rows.
        """
        model = self._kept(f"trials/{candidate.name}", f"static-{candidate.name}", lambda: self._train(candidate))
        quality = self._held_out(f"trials/{candidate.name}", model)
        timings = self._timings(candidate)
        speedup = timings[candidate.name].ratio_to(timings[DENSE])
        return Trial(candidate, quality, quality / dense_quality if dense_quality > 0 else math.nan, speedup)

    def _train(self, candidate: Candidate) -> PreTrainedModel:
        recipe, layers = self.options.recipe, candidate.layers(self.source.config.num_hidden_layers)
        # One conversion with routers serves every number of experts.
        kind, shape = ("routed", str(candidate.num_layers)) if recipe.routes else ("converted", candidate.name)
        name = f"{kind}-{shape}"
        # The dense model is read anew for each training: a teacher comes back frozen.
        converted = self._kept(
            f"{kind}/{shape}",
            name,
            lambda: convert(self.dense(), layers, self.setup, recipe, keep=candidate.keep, name=name),
        )
        static = without_routers(converted, candidate.keep)
        return recover(static, self.dense(), self.setup, recipe, name=f"static-{candidate.name}")

    def _kept(self, folder: str, training: str, make: Callable[[], PreTrainedModel]) -> PreTrainedModel:
        model = kept_model(self.output / folder, self.tokenizer, make)
        shutil.rmtree(self.setup.folder / training, ignore_errors=True)  # checkpoints of a training that is over
        return model

    def _load(self, folder: Path) -> PreTrainedModel:
        return AutoModelForSequenceClassification.from_pretrained(folder).eval()

    def _held_out(self, folder: str, model: PreTrainedModel) -> float:
        path = self.output / folder / "held_out.json"
        if not path.exists():
            metrics = self.task.compute_metrics(self.predict(model, self.data["validation"], self.tokenizer))
            write_text(path, json.dumps(for_json(metrics)) + "\n")
        quality = json.loads(path.read_text(encoding="utf-8"))[self.task.headline]
        return math.nan if quality is None else quality

    def _timings(self, candidate: Candidate) -> dict[str, Timing]:
        def verified() -> dict[str, Any]:
            folders = {DENSE: self.output / DENSE, candidate.name: self.output / "trials" / candidate.name}
            models = {name: self._load(folder).to(self.options.device) for name, folder in folders.items()}
            timings = self.measure(models, *self.options.shape, num_rounds=10)
            return {name: asdict(timing) for name, timing in timings.items()}

        stored = self._measured(candidate.name, verified)
        return {name: Timing(**{**timing, "seconds": tuple(map(tuple, timing["seconds"]))}) for name, timing in stored.items()}

    def _measured(self, key: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Returns what `speeds.json` holds under `key`, made first if it is not there or of another machine."""
        path = self.output / "speeds.json"
        machine = {name: value for name, value in environment().items() if name in ("machine", "gpu", "torch")}
        machine["threads"] = str(torch.get_num_threads())
        stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if stored.get("on") != machine:
            stored = {"on": machine}
        if key not in stored:
            stored[key] = make()
            write_text(path, json.dumps(stored) + "\n")
        return stored[key]


def load_source(model_name: str, task: Task, fine_tuned: bool) -> PreTrainedModel:
    """Loads the model to compress, as a Shrp model.

    Args:
        model_name: Hub id or directory.
        task: The task that its labels must fit.
        fine_tuned: Whether it must have a trained head for the task; otherwise it gets a new one where it has none.

    Raises:
        ValueError: It has no trained head, or one with other labels or in another order; or its family is not supported.
    """
    load = AutoModelForSequenceClassification.from_pretrained
    if not fine_tuned:
        return to_shrp(load_safely(load, model_name, **task.config_kwargs)).eval()
    model, info = load_safely(load, model_name, output_loading_info=True)
    missing = [key for key in sorted(info["missing_keys"]) if not key.startswith(f"{model.base_model_prefix}.")]
    if missing:
        raise ValueError(
            f"`{model_name}` has no trained task head ({missing[0]} is missing): give a model that was fine-tuned on "
            f"{task.name!r}, or epochs to fine-tune it first (`dense_epochs`, `--dense-epochs 3`)."
        )
    config = model.config
    if config.num_labels != task.num_labels:
        raise ValueError(
            f"`{model_name}` predicts {config.num_labels} labels, but the task {task.name!r} has {task.num_labels}: give a "
            "model that was fine-tuned on it."
        )
    theirs = [str(config.id2label[i]).casefold() for i in range(config.num_labels)]
    ours = [name.casefold() for name in task.label_names]
    if theirs != ours and sorted(theirs) == sorted(ours):
        raise ValueError(
            f"`{model_name}` numbers its labels {theirs}, but the task {task.name!r} numbers them {ours}: every prediction "
            "would be taken for another. Reorder the rows of its classifier, or fine-tune it on this task."
        )
    return to_shrp(model).eval()
