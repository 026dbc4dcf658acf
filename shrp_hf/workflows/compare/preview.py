"""What a comparison would do, said without doing it: which jobs are left, and about how long they take."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, replace

from shrp_hf.defaults import CALIBRATION_SAMPLES
from shrp_hf.publishing.report import predict_on
from shrp_hf.tasks.baseline import check_learned
from shrp_hf.tasks.fine_tuned import load_fine_tuned, load_to_fine_tune
from shrp_hf.training.effort import Pace, Training, conversion, fine_tuning, is_teacher_stored, measure_pace, recovery
from shrp_hf.workflows.compare.grid import Job
from shrp_hf.workflows.compare.run import Comparison
from shrp_hf.workflows.compare.tables import name_of
from shrp_hf.workflows.preview import PlannedStep, Preview

_PACE = (
    "thin layers and fewer layers are taken to train as many times faster as they have less to do, all others as slowly as "
    "the dense model, which is more than most take"
)
_NOT_COUNTED = "The choice of heads beside its pass over rows, and the timing of the shapes at the end, are not counted."


def preview_comparison(comparison: Comparison) -> Preview:
    """Finds out which jobs a comparison would do, in which order, and about how long one process would take.

    Args:
        comparison: The comparison; nothing in its directory is changed.

    Raises:
        ValueError: A dense model that is there already is no better than the majority class, and `force` is not given.
    """
    worker, settings = comparison.worker, comparison.worker.settings
    comparison.check_dense()
    dense = (load_to_fine_tune if settings.dense_epochs else load_fine_tuned)(settings.model, worker.task)
    if comparison.unchecked and not settings.dense_epochs:
        metrics = worker.task.compute_metrics(predict_on(dense, worker.data["validation"], worker.tokenizer))
        check_learned(worker.task, metrics[worker.task.chosen_by], settings.model)
    left = {job.key for job in comparison.missing()}
    groups: dict[str, list[Job]] = {}
    for job in comparison.jobs.values():
        if job.key in left or worker.is_done(job):
            groups.setdefault(_name(job), []).append(job)
    pace = measure_pace(dense, worker.setup(next(iter(comparison.jobs.values()))))
    known = {name: found for name, jobs in groups.items() if (found := _recorded(comparison, jobs))}
    steps = [_planned(comparison, name, jobs, left, pace, known.get(name)) for name, jobs in groups.items()]
    count = sum(step.num > step.num_done for step in steps if step.name in known)
    basis = f"{pace.basis}; {_PACE}"
    if count:
        basis += f". For {count} of the kinds of jobs it is what the same took for other seeds here"
    return Preview(tuple(steps), _teaching(comparison, left, pace), basis, (_NOT_COUNTED,), has_names=False)


def _name(job: Job) -> str:
    return job.key.removesuffix(f"-seed{job.seed}")


def _planned(
    comparison: Comparison, name: str, jobs: Sequence[Job], left: set[str], pace: Pace, known: float | None
) -> PlannedStep:
    """Jobs that differ only in their seed."""
    num_left = sum(job.key in left for job in jobs)
    trainings = trainings_of(jobs[0], comparison)
    seconds = known
    if seconds is None:
        speedup = _speedup(jobs[0], comparison.shape.num_layers)
        trained = sum(training.seconds(pace, speedup) for training in trainings)
        seconds = trained + _rows_read(jobs[0], comparison) / comparison.worker.settings.batch_size * pace.forward
    return PlannedStep(name, _described(jobs[0]), tuple(trainings), num_left * seconds, len(jobs), len(jobs) - num_left)


def _described(job: Job) -> str:
    """What a job makes, cells by the words of the tables."""
    if job.kind == "stats":
        return f"part: scores of {job.fields['statistics']}"
    if job.kind in ("convert", "shorten"):
        way = {"convert": "converted", "shorten": "spread" if job.fields.get("spread") else "first"}[job.kind]
        return f"part: {job.fields['layers']} layers {way}"
    cell = {**job.fields, "settings": {"recipe": job.recipe and asdict(job.recipe)}}
    name = name_of(cell | {"recipe": job.recipe and job.recipe.name})
    return f"part: plan of {name}" if job.kind == "plan" else name


def trainings_of(job: Job, comparison: Comparison) -> list[Training]:
    """The trainings of a job, in order.

    Args:
        job: One of the comparison's.
        comparison: The comparison.
    """
    setup, settings, total = comparison.worker.setup(job), comparison.worker.settings, comparison.shape.num_layers
    if job.kind == "dense":
        return fine_tuning(setup, settings.dense_epochs)
    if job.recipe is None:
        return []
    if job.kind == "plan":
        found = fine_tuning(setup, settings.dsp_epochs, "choosing")
        return [replace(training, has_teacher=job.recipe.distils) for training in found]
    if job.kind == "convert":
        return conversion(setup, job.recipe, job.fields["layers"])
    if job.kind == "shorten":
        epochs = job.recipe.conversion_epochs(total - job.fields["layers"])
    else:
        epochs = job.fields["recovery_epochs"]
    return recovery(setup, replace(job.recipe, recovery_epochs=epochs))


def _speedup(job: Job, num_layers: int) -> float:
    """How many times as fast as the dense model its model trains, where that follows from what it is; else 1."""
    method, value = job.fields.get("method"), job.fields.get("value")
    if job.kind == "shorten" or method in ("truncate", "spread"):
        return num_layers / (value or job.fields["layers"])
    if method == "thin" and job.kind == "cell":
        return value if job.fields["budget"] == "speedup" else 1 / value
    return 1.0


def _rows_read(job: Job, comparison: Comparison) -> int:
    """Rows that a job reads beside its training; those that heads are scored on count three times, as they do in a step."""
    worker = comparison.worker
    if job.is_cell:
        return len(worker.data["test"]) + len(worker.data["validation"])
    if job.kind == "stats":
        return 3 * min(worker.settings.calibration_samples, len(worker.data["train"]))
    if job.kind == "convert" and not job.recipe.routes:
        return 3 * min(CALIBRATION_SAMPLES, len(worker.data["train"]))
    return 0


def _recorded(comparison: Comparison, jobs: Sequence[Job]) -> float | None:
    """What the job took for the seeds that are done, in seconds; None where none is."""
    files = [comparison.worker.file(job) for job in jobs]
    found = [json.loads(file.read_text(encoding="utf-8"))["seconds"] for file in files if file.exists()]
    return statistics.fmean(found) if found else None


def _teaching(comparison: Comparison, left: set[str], pace: Pace) -> float:
    """Seconds in which what teachers say is computed: once for each dense model with recoveries to do."""
    seeds = set()
    for job in comparison.jobs.values():
        if job.key in left and job.kind in ("shorten", "control", "cell") and trainings_of(job, comparison):
            recipe = replace(job.recipe, recovery_epochs=trainings_of(job, comparison)[0].epochs)
            if is_teacher_stored(comparison.worker.setup(job), recipe):
                seeds.add(job.seed if comparison.worker.settings.dense_epochs else None)
    return len(seeds) * len(comparison.worker.data["train"]) / comparison.worker.settings.batch_size * pace.forward
