"""Which candidate to train next, and which of the trained ones to take: no files, no models."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice, zip_longest

from shrp_hf.workflows.compress.candidates import STRUCTURES, Candidate


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


def check_reachable(speeds: Mapping[Candidate, float], targets: Targets, total: int, thin: float = 0.0) -> None:
    """Refuses a speed-up that no candidate reaches, before anything is trained.

    Args:
        speeds: Speed-up of each candidate.
        targets: What must be reached.
        total: Layers of the model.
        thin: What thin layers reach at most, by the table of times, where they are still to be planned.

    Raises:
        ValueError: Names the fastest; or nothing is faster than the dense model.
    """
    fastest = max(speeds, key=lambda candidate: speeds[candidate], default=None)
    reach = max(thin, 0.0 if fastest is None else speeds[fastest])
    if reach <= 1:
        raise ValueError("No candidate runs faster than the dense model at this `shape` on this machine: try a larger one.")
    if not targets.fast_enough(reach):
        what = (
            f"the fastest of {len(speeds)} candidates ({fastest.describe(total)}) runs" if reach > thin else "thin layers run"
        )
        raise ValueError(
            f"`speedup` {targets.speedup:g} is out of reach on this machine: {what} {reach:.2f}x as fast as the dense model. "
            f"Ask for at most {int(reach * 100) / 100:g}, or measure at another `shape`."
        )


def search(
    ordered: list[Candidate],
    speeds: Mapping[Candidate, float],
    targets: Targets,
    attempt: Callable[[Candidate], Trial],
    max_trials: int,
) -> list[Trial]:
    """Trains candidates, the most promising structure first; which of the trials to take is `best`'s to say.

    With a speed-up to reach, the candidates whose shape reaches it take turns: the best that is expected of each structure,
    then the second best of each. With a quality to keep as well, the first that meets both ends the search; without, each
    structure is tried until one of its candidates is fast enough when it is measured again, and the best in quality is to
    be taken. With a quality alone, bisection finds the fastest candidate of a structure that holds it, taking quality to
    fall as speed rises; the next structures are only tried where they are faster than what holds it so far.

    A trial that is interrupted (Ctrl-C) ends the search with those before it, if there is one.

    Args:
        ordered: Candidates worth training, by speed; from `worthwhile`.
        speeds: Predicted speed-up of each.
        targets: What must be reached.
        attempt: Trains a candidate.
        max_trials: Most candidates to train.

    Returns:
        The trials in the order in which they were made, at least one.
    """
    groups = [[c for c in ordered if c.structure == structure] for structure in STRUCTURES]
    trials: list[Trial] = []
    walk = _bisection if targets.speedup is None else _turns
    for candidate in islice(walk(groups, speeds, targets, trials), max_trials):
        try:
            trials.append(attempt(candidate))
        except KeyboardInterrupt:
            if not trials:
                raise
            break
    return trials


def _bisection(
    groups: list[list[Candidate]], speeds: Mapping[Candidate, float], targets: Targets, trials: list[Trial]
) -> Iterator[Candidate]:
    """Yields what to train next; the caller appends its trial before it asks again."""
    for group in groups:
        held = max((trial.speedup for trial in trials if trial.meets(targets)), default=0.0)
        faster = [candidate for candidate in group if speeds[candidate] > held]
        slow, fast = -1, len(faster)
        while fast - slow > 1:
            middle = (slow + fast) // 2
            yield faster[middle]
            slow, fast = (middle, fast) if trials[-1].meets(targets) else (slow, middle)


def _turns(
    groups: list[list[Candidate]], speeds: Mapping[Candidate, float], targets: Targets, trials: list[Trial]
) -> Iterator[Candidate]:
    """Yields what to train next; the caller appends its trial before it asks again."""
    reaching = [[c for c in group if targets.fast_enough(speeds[c])] for group in groups]
    turns = zip_longest(*(sorted(group, key=lambda candidate: candidate.expected_rank) for group in reaching))
    for candidate in filter(None, chain.from_iterable(turns)):
        if targets.keep_quality is None:
            fast = {trial.candidate.structure for trial in trials if targets.fast_enough(trial.speedup)}
            if candidate.structure in fast:  # the others of its structure are smaller
                continue
        yield candidate
        if targets.keep_quality is not None and trials[-1].meets(targets):
            return


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
