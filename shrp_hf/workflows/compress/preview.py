"""What a compression would do: it reads, measures and scores as one does, trains nothing, and leaves its directory alone."""

import math
import shutil
import tempfile
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from shrp_hf.scoring import HeadStats
from shrp_hf.structures import score
from shrp_hf.training.effort import Pace, Training, conversion, fine_tuning, is_teacher_stored, measure_pace, recovery
from shrp_hf.workflows.compress.candidates import DENSE, Candidate, Experts, worthwhile
from shrp_hf.workflows.compress.run import Compression, Say
from shrp_hf.workflows.compress.search import Trial, search
from shrp_hf.workflows.preview import PlannedStep, Preview
from shrp_hf.workflows.run_directory import check_claim, saved_model

_AT_MOST = (
    "Which candidates follow the first depends on the quality that those before them keep. Listed are those that are trained "
    "where none keeps enough; the first that does may end it, or lead to others."
)
_ONE_EACH = (
    "A candidate that turns out slower than predicted once it is trained is followed by the next of its structure, up to "
    "`--max-trials` in all."
)
_BEFORE_TUNING = (
    "Thin layers are planned and timed with the model as it is before its fine-tuning, and whether that teaches it anything "
    "is not known: both are looked at again after it."
)


class CompressionPreview(Compression):
    """A `Compression` that is not done. Its arguments, and what it refuses, are the same."""

    def preview(self, show: Say) -> Preview:
        """Finds out what `run` would train, in which order, and about how long it would take.

        Args:
            show: Called with Markdown worth reading meanwhile.

        Raises:
            ValueError: As in `run`.
        """
        speeds, reach = self._measured(show)
        has_dense = self._is_kept(DENSE) or not self.options.dense_epochs
        quality = self._learned(show) if has_dense else math.nan
        speeds = self._with_planned(speeds, reach, show)
        trials = search(
            worthwhile(speeds),
            speeds,
            self.options.targets,
            lambda candidate: self._expected(candidate, speeds[candidate], quality),
            self.options.max_trials,
        )
        pace = measure_pace(self.dense(), self.setup)
        candidates = [trial.candidate for trial in trials]
        steps = (self._tuning(pace), *self._planned_steps(candidates, speeds, pace))
        basis = f"{pace.basis}; a candidate is taken to train as many times faster as it runs"
        order = _ONE_EACH if self.options.targets.keep_quality is None else _AT_MOST
        notes = (order,) if has_dense else (order, _BEFORE_TUNING)
        return Preview(steps, self._reading(steps[1:], pace), basis, notes)

    def _expected(self, candidate: Candidate, speedup: float, dense_quality: float) -> Trial:
        """What a candidate has reached, where it was trained before; else its predicted speed, and no quality."""
        folder, quality = f"trials/{candidate.name}", math.nan
        if self._is_kept(folder):
            if self._read(f"{folder}/held_out.json") is not None:
                quality = self._held_out(folder, self.source)
            if candidate.name in self._stored():
                timings = self._timings(candidate)
                speedup = timings[candidate.name].ratio_to(timings[DENSE])
        return Trial(candidate, quality, quality / dense_quality if dense_quality > 0 else math.nan, speedup)

    def _tuning(self, pace: Pace) -> PlannedStep:
        trainings, is_done = fine_tuning(self.setup, self.options.dense_epochs), self._is_kept(DENSE)
        seconds = 0.0 if is_done else sum(training.seconds(pace) for training in trainings)
        what = "fine-tuned first" if trainings else "as it comes"
        return PlannedStep(DENSE, what, tuple(trainings), seconds, num_done=int(is_done or not trainings))

    def _planned_steps(self, candidates: list[Candidate], speeds: dict[Candidate, float], pace: Pace) -> list[PlannedStep]:
        total, recipe, steps = self.source.config.num_hidden_layers, self.options.recipe, []
        routed = {path.name for path in (self.output / "routed").glob("*") if (path / "config.json").exists()}
        for candidate in candidates:
            is_done, trainings = self._is_kept(f"trials/{candidate.name}"), recovery(self.setup, recipe)
            seconds = sum(training.seconds(pace, speeds[candidate]) for training in trainings)
            if isinstance(candidate, Experts) and str(candidate.num_layers) not in routed:
                routed.add(str(candidate.num_layers))  # one conversion serves every number of experts
                before: list[Training] = conversion(self.setup, recipe, candidate.num_layers)
                seconds += sum(training.seconds(pace) for training in before)
                trainings = [*before, *trainings]
            what = f"{candidate.describe(total)}, {speeds[candidate]:.2f}x"
            steps.append(
                PlannedStep(candidate.name, what, tuple(trainings), 0.0 if is_done else seconds, num_done=int(is_done))
            )
        return steps

    def _reading(self, steps: tuple[PlannedStep, ...], pace: Pace) -> float:
        """Seconds of the teacher's pass over the training rows, and of judging: held-out rows each, reported rows twice."""
        num = sum(step.num - step.num_done for step in steps)
        rows = num * len(self.data["validation"]) + 2 * len(self.data["test"])
        rows += len(self.data["train"]) if num and is_teacher_stored(self.setup, self.options.recipe) else 0
        return rows / self.options.batch_size * pace.forward

    # --- the directory ---

    @cached_property
    def _unwritten(self) -> dict[str, str]:
        return {}

    def _claim(self, identity: dict[str, Any]) -> None:
        check_claim(self.output, identity)

    def _read(self, name: str) -> str | None:
        return self._unwritten.get(name) or super()._read(name)

    def _write(self, name: str, text: str) -> None:
        self._unwritten[name] = text

    def _is_kept(self, folder: str) -> bool:
        return (self.output / folder / "config.json").exists()

    def dense(self) -> PreTrainedModel:
        """Returns the dense model that is there, or the one that it would be made from."""
        return saved_model(self.output / DENSE) if self._is_kept(DENSE) else self.source.cpu()

    @cached_property
    def stats(self) -> HeadStats:
        """Scores of the dense model's heads and neurons; what is stored of them is taken up, and nothing more is stored."""
        stored = self.output / "scores.safetensors"
        with tempfile.TemporaryDirectory() as scratch:
            cache = Path(scratch, stored.name)
            if stored.exists():
                shutil.copyfile(stored, cache)
            return score(self.dense(), self.setup, cache=cache)
