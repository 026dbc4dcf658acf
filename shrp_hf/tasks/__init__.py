"""What a model is trained and judged on: kinds of task, and rows from files, directories, the Hub."""

from shrp_hf.tasks.baseline import Baseline, baseline_of, check_learned
from shrp_hf.tasks.columns import Reading
from shrp_hf.tasks.fine_tuned import load_fine_tuned, load_to_fine_tune
from shrp_hf.tasks.kind import Kind
from shrp_hf.tasks.kinds import KINDS
from shrp_hf.tasks.labels import label_names_of
from shrp_hf.tasks.loading import load_task
from shrp_hf.tasks.sources import TASK_NAMES
from shrp_hf.tasks.task import Task

__all__ = [
    "KINDS",
    "TASK_NAMES",
    "Baseline",
    "Kind",
    "Reading",
    "Task",
    "baseline_of",
    "check_learned",
    "label_names_of",
    "load_fine_tuned",
    "load_task",
    "load_to_fine_tune",
]
