"""A comparison from start to end: which jobs are left, who does them, what became of them."""

import json
import shutil
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from shrp_hf.checkpoints import open_config
from shrp_hf.publishing.report import write_text
from shrp_hf.tasks.baseline import check_learned
from shrp_hf.tasks.task import Task
from shrp_hf.training.recipes import check_lesson_of
from shrp_hf.workflows.compare.cells import Settings, Worker
from shrp_hf.workflows.compare.claims import claim
from shrp_hf.workflows.compare.grid import Grid, Job, ModelShape
from shrp_hf.workflows.run_directory import check_output

POLL_SECONDS = 1.0

Watch = Callable[[int, int, str], object]


class Comparison:
    """The cells of grids in one directory, shared with every other run that was started on it.

    Args:
        settings: What holds for every cell of the directory.
        grids: What is compared, what comes first is done first. Another run may add other grids to the directory.
        task: What the model does; chosen on its held-out rows, reported on the others.
        output: The directory: `cells` (a JSON file each, and a row of the result), `parts` and `models` (what cells are
            made of), `stats`, `claims`.
        force: Go on with a dense model that is no better than the majority class.

    Raises:
        ValueError: The grid or the model does not suit, the directory holds cells of other settings, or it is the model's.
    """

    def __init__(
        self, settings: Settings, grids: Grid | Sequence[Grid], task: Task, output: Path, force: bool = False
    ) -> None:
        grids = [grids] if isinstance(grids, Grid) else grids
        if not task.kind.is_tuned:  # a dense model that is its own teacher stays as it is
            grids = [replace(grid, without_control=True) for grid in grids]
        check_output(output, [settings.model], ("models", "checkpoints"))
        self.shape = _shape_of(settings, task)
        for grid in grids:
            grid.check(self.shape, settings.min_heads_per_layer)
        self.output = output
        self.worker = Worker(settings, task, output)
        fastest = max((times for grid in grids for times in grid.thin), default=None)
        if fastest is not None:
            self.worker.check_thin(fastest)
        self.jobs: dict[str, Job] = {}
        for job in chain.from_iterable(grid.jobs().values() for grid in grids):
            if job.recipe is not None:
                check_lesson_of(job.recipe, task.kind.is_tuned)
            self.jobs.setdefault(job.key, job)
        self._started = time.time()
        self.unchecked = [] if force else [job for job in self.jobs.values() if job.kind == "dense"]
        self._check_directory()

    @property
    def cells(self) -> list[Job]:
        """The jobs that become rows of the result."""
        return [job for job in self.jobs.values() if job.is_cell]

    def run(self, watch: Watch = lambda done, total, doing: None) -> dict[str, str]:
        """Does what is missing, side by side with other runs on the same directory, until all is done or has failed.

        Args:
            watch: Called with cells done (by whomever), cells in all, and the job that begins, or "" for waiting.

        Returns:
            Key -> error of every cell that could not be computed.

        Raises:
            ValueError: A dense model is no better than the majority class on the held-out rows, and `force` is not given.
        """
        while (is_busy := self.step(watch)) or self.is_missing:
            if not is_busy:  # the other runs have all that can be done now
                self._watch(watch, "")
                time.sleep(POLL_SECONDS)
        self._watch(watch, "")
        return self.failures()

    def failures(self) -> dict[str, str]:
        """Key -> error of every cell that could not be computed."""
        return {job.key: self._failure(job) for job in self.cells if self._failure(job)}

    @property
    def is_missing(self) -> bool:
        """Whether there is a job that is neither done nor has failed."""
        return bool(self.missing())

    def step(self, watch: Watch = lambda done, total, doing: None) -> bool:
        """Does the first job that nobody has.

        Args:
            watch: As in `run`.

        Returns:
            Whether there was one. If not, nothing is missing, or the other runs have all that can be done now.

        Raises:
            ValueError: As in `run`.
        """
        self.check_dense()
        return any(self._do(job, watch) for job in self.missing() if self._is_ready(job))

    def check_dense(self) -> None:
        """Stops before hours are spent on a model that has learned nothing, whichever run made it.

        Raises:
            ValueError: The record of a dense model says so, and `force` is not given.
        """
        for job in self.unchecked.copy():
            file = self.worker.file(job)
            if file.exists():
                held_out = json.loads(file.read_text(encoding="utf-8"))["held_out"]
                check_learned(self.worker.task, held_out[self.worker.task.chosen_by], self.worker.settings.model)
                self.unchecked.remove(job)

    def drop_models(self) -> None:
        """Removes the models that cells were made of, once every cell of this grid is there."""
        if all(self.worker.file(job).exists() for job in self.cells):
            shutil.rmtree(self.output / "models", ignore_errors=True)

    def missing(self) -> list[Job]:
        """Jobs to do, in order: cells without a file, and what they need that is not there."""
        wanted: set[str] = set()
        for job in reversed(self.jobs.values()):
            # A cell needs its file, what others read also the model behind it.
            done = self.worker.is_done(job) if job.key in wanted else self.worker.file(job).exists() or not job.is_cell
            if not done and not self._failure(job):
                wanted |= {job.key, *job.needs}
        return [job for job in self.jobs.values() if job.key in wanted and not self.worker.is_done(job)]

    def _is_ready(self, job: Job) -> bool:
        return all(self.worker.is_done(self.jobs[key]) for key in job.needs)

    def _do(self, job: Job, watch: Watch) -> bool:
        """Does a job if nobody else has it; returns whether it was done or has failed here."""
        with claim(self.output / "claims" / f"{job.key}.lock") as is_ours:
            if not is_ours or self.worker.is_done(job) or self._failure(job):
                return False
            self._watch(watch, job.key)
            try:
                self.worker.do(job)
            except Exception:  # the other cells go on; what happened is kept, and reported at the end
                self._error_file(job).parent.mkdir(parents=True, exist_ok=True)
                write_text(self._error_file(job), traceback.format_exc())
            else:
                self._error_file(job).unlink(missing_ok=True)
            return True

    def _error_file(self, job: Job) -> Path:
        return self.worker.file(job).with_suffix(".error")

    def _failure(self, job: Job) -> str | None:
        """Why a job cannot be done: its own error, or that of one it needs. Errors of earlier runs do not count."""
        file = self._error_file(job)
        if file.exists() and file.stat().st_mtime >= self._started and not self.worker.is_done(job):
            return file.read_text(encoding="utf-8").strip().splitlines()[-1]
        for key in () if self.worker.is_done(job) else job.needs:
            if self._failure(self.jobs[key]):
                return f"needs {key}: {self._failure(self.jobs[key])}"
        return None

    def _watch(self, watch: Watch, doing: str) -> None:
        cells = self.cells
        watch(sum(self.worker.file(job).exists() for job in cells), len(cells), doing)

    def _check_directory(self) -> None:
        for job in self.jobs.values():
            if not self.worker.file(job).exists():
                continue
            found = json.loads(self.worker.file(job).read_text(encoding="utf-8"))["settings"]
            wanted = json.loads(json.dumps(self.worker.identity(job)))  # as it would be read back
            for name in {**wanted, **found}:
                if found.get(name) != wanted.get(name):
                    raise ValueError(
                        f"`output` {str(self.output)!r} holds {job.key} with another `{name}`: {found.get(name)!r}, not "
                        f"{wanted.get(name)!r}. Choose another directory, or remove this one."
                    )


def _shape_of(settings: Settings, task: Task) -> ModelShape:
    """What the checks need to know of the model; only its config is read."""
    config: Any = open_config(settings.model)
    kept, experts = getattr(config, "kept_heads", None), getattr(config, "expert_layers", ())
    if kept is not None or experts:
        raise ValueError(
            f"`model` {settings.model!r} has pruned heads or expert layers already: compare from the dense model it came from."
        )
    family = config.model_type.removeprefix("shrp_")
    converts = family in ("bert", "roberta", "xlm-roberta", "camembert")
    return ModelShape(config.num_hidden_layers, config.num_attention_heads, converts, task.kind.has_classes)
