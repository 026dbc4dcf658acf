"""What a run would do, said without doing it: its steps in order, how long each trains, what is there already."""

from dataclasses import dataclass

from shrp_hf.measuring.markdown import markdown_table
from shrp_hf.training.effort import Training


@dataclass(frozen=True)
class PlannedStep:
    """A model that a run would train.

    Args:
        name: Its name in the directory.
        what: Spells it out.
        trainings: What it is trained by, in order; those of one seed.
        seconds: How long that takes, without what is done.
        num: How many there are, one a seed.
        num_done: How many of them are there, and would be kept.
    """

    name: str
    what: str
    trainings: tuple[Training, ...]
    seconds: float
    num: int = 1
    num_done: int = 0

    @property
    def steps(self) -> int:
        """Optimizer steps that are left to do."""
        return sum(training.steps for training in self.trainings) * (self.num - self.num_done)

    def line(self) -> list[str]:
        """Its line in the table of `Preview.text`, its name first."""
        told = [f"{training.name} {training.epochs:g}" for training in self.trainings]
        rows, steps = (sum(getattr(training, name) for training in self.trainings) for name in ("rows", "steps"))
        done = "all" if self.num == self.num_done else f"{self.num_done} of {self.num}"
        left = "kept" if self.num == self.num_done else duration(self.seconds)
        return [self.name, self.what, " + ".join(told) or "-", f"{rows:,}", f"{steps:,}", done, left]


@dataclass(frozen=True)
class Preview:
    """What a run would do.

    Args:
        steps: The models that it would train or use, in order.
        other_seconds: What it spends on reading rows beside the trainings: teaching, judging, scoring.
        basis: What the seconds rest on.
        notes: Sentences about what is not certain.
        has_names: Whether the names of the steps are shown.
    """

    steps: tuple[PlannedStep, ...]
    other_seconds: float
    basis: str
    notes: tuple[str, ...] = ()
    has_names: bool = True

    @property
    def seconds(self) -> float:
        """How long it would take in all."""
        return sum(step.seconds for step in self.steps) + self.other_seconds

    def text(self) -> str:
        """Returns Markdown: a line a step, the sum, and what it rests on."""
        lines = [["", "what it is", "epochs", "rows", "steps", "done", "about"], *(step.line() for step in self.steps)]
        first = 0 if self.has_names else 1
        titles, *lines = (line[first:] for line in lines)
        table = markdown_table(titles, lines, 3 - first)
        num, num_done = (sum(getattr(step, name) for step in self.steps) for name in ("num", "num_done"))
        steps = sum(step.steps for step in self.steps)
        left = f"{num - num_done:,} of {num:,} to do ({num_done:,} there already), {steps:,} training steps"
        summary = (
            f"**{left}, about {duration(self.seconds)}**, of which {duration(self.other_seconds)} is reading without training."
        )
        parts = [table, summary, f"The estimate rests on {self.basis}.", *self.notes]
        return "\n\n".join((*parts, "This was a dry run: nothing was trained, and nothing was written to `--output`."))


def duration(seconds: float) -> str:
    """Prints a duration in the unit that suits it, with two digits at the most below a hundred."""
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}" if seconds < 10 * size else f"{seconds / size:,.0f} {unit}"
    return f"{seconds:.0f} s"
