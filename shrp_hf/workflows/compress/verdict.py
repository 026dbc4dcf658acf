"""What a compression found: the result on the reported rows, its report, its picture, its record."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import EvalPrediction, PreTrainedModel

from shrp_hf.defaults import CALIBRATION_SAMPLES
from shrp_hf.measuring import Timing
from shrp_hf.measuring.environment import command_line, environment
from shrp_hf.measuring.markdown import markdown_table
from shrp_hf.publishing.card import write_card
from shrp_hf.publishing.page import facts, page, sortable_table, words
from shrp_hf.publishing.plots import plot_frontier
from shrp_hf.publishing.record import Rows, RunRecord, Score, expert_choice, origin, source_name
from shrp_hf.publishing.report import ModelReport, compare_models, measure_models, write_text
from shrp_hf.tasks.baseline import baseline_of
from shrp_hf.tasks.task import Task, for_json, shown
from shrp_hf.workflows.compress.candidates import Candidate, Experts, FirstLayers, speed_table
from shrp_hf.workflows.compress.options import CompressOptions
from shrp_hf.workflows.compress.page import trial_frontier, trial_maps
from shrp_hf.workflows.compress.search import Targets, Trial, best, share_text

NUM_RESAMPLES = 1000
_NO_SHARE = "No share of the dense model's quality can be given (a dash): its {} is not above 0, or one is undefined."

Interval = tuple[float, float]


@dataclass(frozen=True)
class Verdict:
    """What a compression found.

    Args:
        model_name: Hub id or directory of what was compressed.
        options: What it aimed at, and how it trained.
        num_layers: Layers of the model.
        dense_quality: The dense model's metric (`Task.chosen_by`) on the held-out rows.
        speeds: Predicted speed-up of every candidate, untrained.
        trials: The candidates that were trained, in order.
        chosen: The one that was kept.
        problem: What is wrong with it when it is opened in a new process; empty where nothing is.
    """

    model_name: str
    options: CompressOptions
    num_layers: int
    dense_quality: float
    speeds: Mapping[Candidate, float]
    trials: tuple[Trial, ...]
    chosen: Trial
    problem: str = ""

    @property
    def targets(self) -> Targets:
        """What it aimed at."""
        return self.options.targets

    @property
    def met(self) -> bool:
        """Whether the chosen one reaches every target, by measured speed and on the held-out rows."""
        return self.chosen.meets(self.targets)


@dataclass(frozen=True)
class Reported:
    """The headline metric on the reported rows, with 95% intervals (bootstrap over the rows, paired for the share).

    Args:
        dense: The dense model's.
        dense_interval: Its interval.
        result: The compressed model's.
        result_interval: Its interval.
        retention: Share of the dense quality that the result keeps.
        retention_interval: Its interval; not finite where resamples leave the dense model nothing.
    """

    dense: float
    dense_interval: Interval
    result: float
    result_interval: Interval
    retention: float
    retention_interval: Interval


def write_verdict(
    verdict: Verdict,
    task: Task,
    output: Path,
    models: Mapping[str, PreTrainedModel],
    predictions: Mapping[str, EvalPrediction],
    timings: Mapping[str, Timing],
) -> None:
    """Judges the reported rows, and writes `report.html`, `report.md`, `compress.json`, `trials.png` and the model's card.

    Args:
        verdict: What was found.
        task: The task.
        output: Directory that holds `model`, and gets the files.
        models: The dense model and the result, in this order.
        predictions: Theirs on the reported rows.
        timings: Theirs, from one run.
    """
    scores = {name: task.compute_metrics(prediction) for name, prediction in predictions.items()}
    dense, result = (score[task.headline] for score in scores.values())
    resampled = task.bootstrap(list(predictions.values()), NUM_RESAMPLES, verdict.options.seed)
    with np.errstate(divide="ignore", invalid="ignore"):
        intervals = [_interval(values) for values in (*resampled, resampled[1] / resampled[0])]
    retention = result / dense if dense > 0 else math.nan
    reported = Reported(dense, intervals[0], result, intervals[1], retention, intervals[2])
    rows = measure_models(models, scores, task, timings=timings)
    write_card(output / "model", _record(verdict, task, models[verdict.chosen.candidate.name], rows, scores))
    points = {t.candidate.name: [_point(t, task)] for t in verdict.trials if not math.isnan(t.quality)}
    picture = "No picture: the quality of every candidate is undefined.\n"
    if points:
        plot_frontier(points, output / "trials.png", verdict.dense_quality, f"held-out {task.chosen_by}")
        picture = "![quality against speed](trials.png)\n"
    write_text(output / "report.md", _report(verdict, task, reported, picture, compare_models(rows, scores, task)))
    write_text(output / "report.html", _page(verdict, task, reported, points, output))
    summary = {
        "met": verdict.met,
        "problem": verdict.problem,
        "targets": asdict(verdict.targets),
        "chosen": _listed(verdict.chosen, verdict),
        "trials": [_listed(trial, verdict) for trial in verdict.trials],
        "reported": asdict(reported),
        "headline": task.headline,
        "command": command_line(),
        "environment": environment(),
    }
    write_text(output / "compress.json", json.dumps(for_json(summary), indent=2) + "\n")


def _listed(trial: Trial, verdict: Verdict) -> dict[str, Any]:
    candidate = trial.candidate
    return {
        "candidate": candidate.name,
        "structure": candidate.structure,
        "what": candidate.describe(verdict.num_layers),
        "quality": trial.quality,
        "retention": trial.retention,
        "speedup": trial.speedup,
    }


def _point(trial: Trial, task: Task) -> tuple[float, float, float, float]:
    interval = Score.of(task.chosen_by, trial.quality, len(task.validation)).interval
    return trial.speedup, trial.quality, *(interval or (trial.quality, trial.quality))


def _interval(values: np.ndarray) -> Interval:
    low, high = np.quantile(values, (0.025, 0.975))
    return float(low), float(high)


def _report(verdict: Verdict, task: Task, reported: Reported, picture: str, comparison: str) -> str:
    where, (batch_size, length) = environment(), verdict.options.shape
    caveat = "" if verdict.options.dense_epochs else (
        "\nThe model came fine-tuned: if it was fine-tuned on these held-out rows too, its quality on them flatters it, and "
        "the shares here are on the strict side.\n"
    )  # fmt: skip
    problem = f"\n**Not verified**: {verdict.problem}\n" if verdict.problem else ""
    return f"""# {task.name}: {verdict.targets}

{_headline(verdict, task.chosen_by)} The model is in `model`.
{problem}
{_on_reported_rows(task.headline, verdict.targets, reported)}

Made from `{"/".join(Path(verdict.model_name).parts[-2:])}` by recipe {verdict.options.recipe.name!r}; options: `run.json`.
Command: `{command_line()}`. Machine: {where["machine"]}, torch {where["torch"]}, {where["date"]}.

{comparison}
## What was tried

{_trial_table(verdict, task)}

Quality is that of {len(task.validation)} rows held out of the training set; speed was measured against the dense model at
{batch_size} x {length} tokens on {verdict.options.device}, predicted before the training and measured again after it.
{_why(verdict)}
{caveat}
{picture}
## Speed of every shape, before any training

All in turns, in one run; throughput as a multiple of the dense model's.

{speed_table(verdict.speeds, verdict.targets.speedup)}
"""


def _page(
    verdict: Verdict,
    task: Task,
    reported: Reported,
    points: Mapping[str, Sequence[tuple[float, float, float, float]]],
    output: Path,
) -> str:
    """`report.html`: the answer, what was tried, and what each keeps; all else is in `report.md`."""
    answer = f"{_headline(verdict, task.chosen_by)} The model is in `model`."
    answer += f" **Not verified**: {verdict.problem}" if verdict.problem else ""
    answer += f" {_on_reported_rows(task.headline, verdict.targets, reported)}"
    total, trials = verdict.num_layers, verdict.trials
    dense = (task.chosen_by, verdict.dense_quality, total)
    titles, *lines = _trial_lines(verdict, task)
    titles[-1] = "choice"
    options = {"model": source_name(verdict.model_name), **verdict.options.identity, **environment()}
    sections = (
        trial_frontier(trials, verdict.speeds, points, dense, output / "trials.png"),
        f"<p>{words(_why(verdict))}</p>\n<h2>What was tried</h2>\n{sortable_table(titles, lines, 2)}",
        f"<h2>Which heads and neurons stay</h2>\n{trial_maps(trials, output / 'trials', total)}",
        f"<h2>How it was done</h2>{facts(options)}\n",
    )
    title = f"{task.name}: {verdict.targets}"
    return page(title, title, words(answer), sections)


def _headline(verdict: Verdict, headline: str) -> str:
    chosen = verdict.chosen
    what = chosen.candidate.describe(verdict.num_layers)
    kept = f"{share_text(chosen.retention)} of its held-out {headline}"
    found = f"{what}: {chosen.speedup:.2f}x the dense model's throughput, {kept}."
    if verdict.met:
        return f"**The target is met**: {found}"
    missed = [] if verdict.targets.fast_enough(chosen.speedup) else ["speed"]
    missed += [] if verdict.targets.good_enough(chosen.retention) else ["quality"]
    return f"**The target is NOT met ({' and '.join(missed)})**; the best of {len(verdict.trials)} tried is {found}"


def _on_reported_rows(headline: str, targets: Targets, reported: Reported) -> str:
    def estimated(value: float, interval: Interval, form: str) -> str:
        if math.isnan(value):
            return f"({shown(value)})"
        low, high = (share_text(bound, form) for bound in interval)
        return f"{value:{form}} (95% interval {low} to {high})"

    if math.isnan(reported.retention):
        kept = _NO_SHARE.format(headline)
    else:
        kept = f"{estimated(reported.retention, reported.retention_interval, '.1%')} of it is kept."
    result, dense = reported.result, reported.dense
    text = (
        f"On the reported rows, which chose nothing, {headline} is {estimated(result, reported.result_interval, '.4f')} "
        f"against {estimated(dense, reported.dense_interval, '.4f')} dense: {kept}"
    )
    if targets.keep_quality is None:
        return text
    low, high = reported.retention_interval
    holds = "**also holds** there" if targets.good_enough(reported.retention) else "**does not hold** there"
    unsure = ", though the interval includes it" if low <= targets.keep_quality <= high else ""
    return f"{text} The target of {targets.keep_quality:.1%} {holds}{unsure}."


def _trial_table(verdict: Verdict, task: Task) -> str:
    header, *lines = _trial_lines(verdict, task)
    lines = [[f"**{cell}**" if cell == "chosen" else cell for cell in line] for line in lines]
    reason = "" if verdict.dense_quality > 0 else f"\n\n{_NO_SHARE.format(task.chosen_by)}"
    return markdown_table(header, lines, 2) + reason


def _trial_lines(verdict: Verdict, task: Task) -> list[list[str]]:
    """Titles and a line for each trial, behind those of the dense model and of what reads nothing."""
    total, headline, blind = verdict.num_layers, task.chosen_by, baseline_of(task, task.validation)
    blind_quality = blind.metrics[headline]
    header = ["tried", "what it is", "predicted", "measured", f"held-out {headline}", "of dense", ""]
    lines = [[blind.name, "", "", "", share_text(blind_quality, ".4f"), "", ""]]
    lines += [["dense", f"{total} layers", "", "1.00x", shown(verdict.dense_quality), "", ""]]
    for trial in verdict.trials:
        cells = [trial.candidate.name, trial.candidate.describe(total)]
        cells += [f"{verdict.speeds[trial.candidate]:.2f}x", f"{trial.speedup:.2f}x", shown(trial.quality)]
        lines.append([*cells, share_text(trial.retention), "chosen" if trial == verdict.chosen else ""])
    return [header, *lines]


def _why(verdict: Verdict) -> str:
    """How candidates were tried, and what the chosen structure is ahead of."""
    targets = verdict.targets
    if targets.speedup is None:
        order = (
            "The candidates of each structure were tried by bisection over their speed, what kept most elsewhere first, for "
            "the fastest that holds the quality; it takes quality to fall as speed rises."
        )
    elif targets.keep_quality is None:
        order = (
            "Of each structure the largest candidate that reaches the speed was tried, what kept most elsewhere first; of "
            "those that are fast enough the best on the held-out rows was kept."
        )
    else:
        order = "Candidates that reach the speed took turns, what kept most elsewhere first, of each structure the largest. "
        order += "The first that met the target was kept." if verdict.met else "None met the target."
    others = [t for t in verdict.trials if t.candidate.structure != verdict.chosen.candidate.structure]
    if not others:
        return order
    rival = best(others, targets)
    found = ", ".join(
        f"{trial.candidate.name} has {shown(trial.quality)} at {trial.speedup:.2f}x" for trial in (verdict.chosen, rival)
    )
    return f"{order} The best of another structure is {rival.candidate.name}: {found}."


def _record(
    verdict: Verdict,
    task: Task,
    model: PreTrainedModel,
    rows: Sequence[ModelReport],
    scores: Mapping[str, Mapping[str, float]],
) -> RunRecord:
    what = {"chosen": verdict.chosen.candidate.describe(verdict.num_layers), "why": _why(verdict)}
    return RunRecord.of(
        model,
        rows,
        scores,
        task,
        **origin(verdict.model_name),
        options={**asdict(verdict.options), **what},
        seeds=(verdict.options.seed,),
        training=Rows(len(task.train), f"training rows of {task.name}"),
        shape=verdict.options.shape,
        **_method(verdict, task),
    )


def _method(verdict: Verdict, task: Task) -> dict[str, Any]:
    """`method` and `calibration` of the record of what was chosen."""
    candidate = verdict.chosen.candidate
    if isinstance(candidate, Experts):
        return expert_choice(verdict.options.recipe, task)
    if isinstance(candidate, FirstLayers):
        return {"method": f"{candidate.structure}-layers"}
    scored = Rows(min(CALIBRATION_SAMPLES, len(task.train)), f"training rows of {task.name}")
    return {"method": "thin", "calibration": scored}
