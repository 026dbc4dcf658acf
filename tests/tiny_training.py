"""A tiny training set and the trainers that the tests run on it."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, Trainer

from shrp_hf.training.arguments import ShrpTrainingArguments
from shrp_hf.training.trainer import ShrpTrainer
from tests.tiny import examples, tiny_bert

DATA = examples(64)  # 48 to train on, 16 held out: 6 steps an epoch
STOCK = {
    "use_cpu": True,
    "report_to": "none",
    "per_device_train_batch_size": 8,
    "learning_rate": 1e-3,
    "save_strategy": "no",
    "logging_steps": 3,
    "disable_tqdm": True,
}
SHRP = STOCK | {"usage_holdout": 0.25}


def bert(**fields) -> PreTrainedModel:
    return tiny_bert(num_labels=2, **fields)


def trainer_for(
    folder: Path, model: PreTrainedModel | None = None, data: Any = DATA, extra: dict | None = None, **options
) -> ShrpTrainer:
    """A ShrpTrainer on a stock BERT; `extra` goes to the trainer, `options` to its arguments."""
    args = ShrpTrainingArguments(folder, **(SHRP | options))
    return ShrpTrainer(bert() if model is None else model, args, train_dataset=data, **(extra or {}))


def logged(trainer: Trainer, name: str) -> list:
    """Every logged value of this name."""
    return [entry[name] for entry in trainer.state.log_history if name in entry]
