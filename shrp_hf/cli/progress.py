"""One bar for each training, in place of what the libraries print."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import datasets
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback
from transformers.utils import logging


class TrainingBar(TrainerCallback):
    """Shows steps and loss of a training, and what is left of it.

    Args:
        console: Where.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.progress: Progress | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Draws the bar; a training that is taken up begins where it stopped."""
        left = (MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[loss]}"))
        columns = (TextColumn("{task.description}"), BarColumn(), *left)
        self.progress = Progress(*columns, console=self.console)
        self.progress.add_task("steps", total=state.max_steps, completed=state.global_step, loss="")
        self.progress.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Moves it on."""
        if self.progress is not None:
            self.progress.update(self.progress.task_ids[0], completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Shows the mean loss since the last one was shown."""
        if self.progress is not None and "loss" in (logs or {}):
            self.progress.update(self.progress.task_ids[0], loss=f"loss {float((logs or {})['loss']):.3f}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leaves the full bar behind."""
        self.stop()

    def stop(self) -> None:
        """Gives the terminal back, also after a training that failed."""
        if self.progress is not None:
            self.progress.stop()
            self.progress = None


@contextmanager
def one_bar_each(console: Console) -> Iterator[TrainingBar]:
    """Gives the bar for the trainings of a command; meanwhile no library draws bars of its own (shards, rows, files)."""
    bar, silenced = TrainingBar(console), []
    for active, disable, enable in (
        (logging.is_progress_bar_enabled(), logging.disable_progress_bar, logging.enable_progress_bar),
        (datasets.are_progress_bars_disabled() is False, datasets.disable_progress_bars, datasets.enable_progress_bars),
    ):
        if active:
            disable()
            silenced.append(enable)
    try:
        yield bar
    finally:
        bar.stop()
        for enable in silenced:
            enable()
