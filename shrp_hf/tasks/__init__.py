"""What a model is trained and judged on: GLUE, SST-5, docstrings, a directory or a Hub data set."""

from shrp_hf.tasks.fine_tuned import load_fine_tuned, load_to_fine_tune
from shrp_hf.tasks.loading import load_task
from shrp_hf.tasks.sources import TASK_NAMES
from shrp_hf.tasks.task import Task

__all__ = ["TASK_NAMES", "Task", "load_fine_tuned", "load_task", "load_to_fine_tune"]
