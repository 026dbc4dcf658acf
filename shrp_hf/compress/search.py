"""Which candidate to train next, and which of the trained ones to take: no files, no models."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from shrp_hf.compress.candidates import Candidate


@dataclass(frozen=True)
class Targets:
    """What the compressed model must reach; at least one of the two.

    Args:
        speedup: Throughput as a multiple of the dense model's, above 1.
        keep_quality: Share of the dense model's quality that stays, above 0 and at most 1.

    Raises:
        ValueError: Neither is given, or one is out of range.
    """

    speedup: float | None = None
    keep_quality: float | None = None

    def __post_init__(self) -> None:
        if self.speedup is None and self.keep_quality is None:
            raise ValueError("Give a target: `speedup` (4 is four times as fast), `keep_quality` (0.98), or both.")
        if self.speedup is not None and not 1 < self.speedup < float("inf"):
            raise ValueError(f"`speedup` must be above 1, the dense model's own speed, got {self.speedup}.")
        if self.keep_quality is not None and not 0 < self.keep_quality <= 1:
            raise ValueError(f"`keep_quality` must be a share above 0 and at most 1, got {self.keep_quality}.")

    def fast_enough(self, speedup: float) -> bool:
        """Whether `speedup` reaches the target, if there is one."""
        return self.speedup is None or speedup >= self.speedup

    def good_enough(self, retention: float) -> bool:
        """Whether `retention`, the share of the dense quality that stays, reaches the target, if there is one."""
        return self.keep_quality is None or retention >= self.keep_quality

    def __str__(self) -> str:
        parts = [] if self.speedup is None else [f"at least {self.speedup:g}x the speed"]
        parts += [] if self.keep_quality is None else [f"at least {self.keep_quality:.1%} of the quality"]
        return " and ".join(parts)


@dataclass(frozen=True)
class Trial:
    """A candidate that was trained.

    Args:
        candidate: Which.
        quality: Its headline metric on the held-out rows; NaN where it is undefined.
        retention: The same as a share of the dense model's; NaN where either has none.
        speedup: Measured with its trained weights, against the dense model in the same run.
    """

    candidate: Candidate
    quality: float
    retention: float
    speedup: float

    def meets(self, targets: Targets) -> bool:
        """Whether it reaches every target."""
        return targets.fast_enough(self.speedup) and targets.good_enough(self.retention)


def share_text(value: float, form: str = ".1%") -> str:
    """Prints a share of the dense model's quality, or a quality; a dash where there is none."""
    return f"{value:{form}}" if math.isfinite(value) else "-"


def check_reachable(speeds: Mapping[Candidate, float], targets: Targets, total: int) -> None:
    """Refuses a speed-up that no candidate reaches, before anything is trained.

    Raises:
        ValueError: Names the fastest candidate; or no candidate is faster than the dense model.
    """
    fastest = max(speeds, key=lambda candidate: speeds[candidate])
    if speeds[fastest] <= 1:
        raise ValueError("No candidate runs faster than the dense model at this `shape` on this machine: try a larger one.")
    if not targets.fast_enough(speeds[fastest]):
        raise ValueError(
            f"`speedup` {targets.speedup:g} is out of reach on this machine: the fastest of {len(speeds)} candidates "
            f"({fastest.describe(total)}) runs {speeds[fastest]:.2f}x as fast as the dense model. Ask for at most "
            f"{int(speeds[fastest] * 100) / 100:g}, or measure at another `shape`."
        )


def search(
    ordered: list[Candidate],
    speeds: Mapping[Candidate, float],
    targets: Targets,
    attempt: Callable[[Candidate], Trial],
    max_trials: int,
) -> list[Trial]:
    """Trains candidates until the targets are met; which of the trials to take is `best`'s to say.

    With a speed-up to reach, the candidates whose shape reaches it take turns by expected quality; the first that meets
    all targets ends the search, so one that misses by the noise of a measurement is followed by a faster one. With a
    quality alone, bisection finds the fastest candidate that holds it, taking quality to fall as speed rises.

    Args:
        ordered: Candidates worth training, by speed; from `worthwhile`.
        speeds: Predicted speed-up of each.
        targets: What must be reached.
        attempt: Trains a candidate.
        max_trials: Most candidates to train.

    Returns:
        The trials in the order in which they were made, at least one.
    """
    trials: list[Trial] = []
    if targets.speedup is None:
        slow, fast = -1, len(ordered)
        while fast - slow > 1 and len(trials) < max_trials:
            middle = (slow + fast) // 2
            trials.append(attempt(ordered[middle]))
            slow, fast = (middle, fast) if trials[-1].meets(targets) else (slow, middle)
        return trials
    reaching = [candidate for candidate in ordered if targets.fast_enough(speeds[candidate])]
    for candidate in sorted(reaching, key=lambda candidate: candidate.expected_rank)[:max_trials]:
        trials.append(attempt(candidate))
        if trials[-1].meets(targets):
            break
    return trials


def best(trials: list[Trial], targets: Targets) -> Trial:
    """Returns the trial to keep.

    Of those that meet all targets the best in quality if a speed-up was asked for, else the fastest. If none does:
    of those that are fast enough the best in quality, or the fastest of all where none is. An undefined quality is the
    worst.
    """

    def quality(trial: Trial) -> float:
        return -math.inf if math.isnan(trial.quality) else trial.quality

    met = [trial for trial in trials if trial.meets(targets)]
    if met and targets.speedup is None:
        return max(met, key=lambda trial: trial.speedup)
    fast = met or [trial for trial in trials if targets.fast_enough(trial.speedup)]
    if fast:
        return max(fast, key=lambda trial: (quality(trial), trial.speedup))
    return max(trials, key=lambda trial: (trial.speedup, quality(trial)))
