"""How long trainings would be: in steps by the rules that they follow themselves, in seconds by a few steps that are timed."""

import copy
import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from shrp_hf.models.outputs import PAIRS, probe_loss, vectors_of
from shrp_hf.training.arguments import ShrpTrainingArguments
from shrp_hf.training.contrast import EPOCHS
from shrp_hf.training.recipes import Recipe, Setup
from shrp_hf.training.sampling import RowCollator

NUM_WARMUP_STEPS = 2
MAX_STEPS = 10
MAX_SECONDS = 10.0


@dataclass(frozen=True)
class Training:
    """A training that could be done.

    Args:
        name: What it is.
        epochs: Its epochs, as the options count them.
        rows: Rows that it sees, each as often as it sees it.
        steps: Optimizer steps.
        has_teacher: Whether a teacher runs beside it in each step; one that was stored before does not.
    """

    name: str
    epochs: float
    rows: int
    steps: int
    has_teacher: bool = False

    def seconds(self, pace: "Pace", speedup: float = 1.0) -> float:
        """About how long it takes.

        Args:
            pace: Of the dense model.
            speedup: How many times as fast as the dense model the trained one is.
        """
        return self.steps * (pace.step / speedup + pace.forward * self.has_teacher)


@dataclass(frozen=True)
class Pace:
    """How fast a dense model trains here.

    Args:
        step: Seconds of a training step.
        forward: Seconds of a batch of the same size that is only read.
        num_steps: Steps that were timed.
        where: The device.
    """

    step: float
    forward: float
    num_steps: int
    where: str

    @property
    def basis(self) -> str:
        """What an estimate by it rests on."""
        return f"{self.num_steps} training steps of the dense model, timed here on {self.where}: {self.step:.3g} s each"


def fine_tuning(setup: Setup, epochs: float, name: str = "fine-tuning") -> list[Training]:
    """The training of `fine_tune` on labels; none of 0 epochs.

    Args:
        setup: What all trainings of the run share.
        epochs: Epochs.
        name: What it is called.
    """
    return [_training(name, setup, epochs, epochs * setup.epoch, len(setup.data["train"]))] if epochs else []


def recovery(setup: Setup, recipe: Recipe) -> list[Training]:
    """The trainings of `recover`: by the recipe, and on pairs where some came along.

    Args:
        setup: What all trainings of the run share.
        recipe: How.
    """
    epochs = recipe.recovery_epochs
    if not epochs:
        return []
    has_teacher = recipe.distils and not is_teacher_stored(setup, recipe)
    share = epochs * setup.epoch
    found = [_training("recovery", setup, epochs, share, len(setup.data["train"]), has_teacher)]
    if PAIRS in setup.data:
        found.append(_training("pairs", setup, EPOCHS, EPOCHS, len(setup.data[PAIRS])))
    return found


def conversion(setup: Setup, recipe: Recipe, num_layers: int) -> list[Training]:
    """The training of `convert`; none without routers.

    Args:
        setup: What all trainings of the run share.
        recipe: How.
        num_layers: Layers to convert.
    """
    if not recipe.routes:
        return []
    rows = len(setup.data["train"])
    set_aside = max(1, round(ShrpTrainingArguments.usage_holdout * rows))  # as `hold_out` does
    share = num_layers * (recipe.balance_epochs_per_layer * setup.epoch) + recipe.specialise_epochs * setup.epoch
    epochs = recipe.conversion_epochs(num_layers)
    return [_training("conversion", setup, epochs, share, rows - set_aside if set_aside < rows else rows, recipe.distils)]


def is_teacher_stored(setup: Setup, recipe: Recipe) -> bool:
    """Whether a recovery has what its teacher says computed once, before it."""
    return recipe.distils and setup.may_store(recipe.recovery_epochs, recipe.distillation_value_relations)


def _training(name: str, setup: Setup, epochs: float, share: float, rows: int, has_teacher: bool = False) -> Training:
    """`share` are the epochs of the whole set of `rows`."""
    batches = math.ceil(rows / (setup.batch_size * max(1, torch.cuda.device_count())))
    return Training(name, epochs, round(share * rows), math.ceil(share * max(1, batches)), has_teacher)


def measure_pace(dense: PreTrainedModel, setup: Setup) -> Pace:
    """Times some training steps of a copy of the dense model, on training rows and where trainings run.

    Args:
        dense: The dense model; left as it is.
        setup: Its rows, batch size and precision are those of the trainings.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = copy.deepcopy(dense).requires_grad_(True).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)

    def loss_of(batch: dict[str, Any]) -> torch.Tensor:
        batch = {name: value.to(device) for name, value in batch.items()}
        with torch.autocast(device, torch.bfloat16, enabled=setup.bf16):
            outputs = model(**batch)
        loss = outputs.get("loss")
        return probe_loss(vectors_of(model, outputs, batch.get("attention_mask")), 0) if loss is None else loss

    def train(batch: dict[str, Any]) -> None:
        loss = loss_of(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # a GPU is waited for

    def read(batch: dict[str, Any]) -> None:
        with torch.inference_mode():
            loss_of(batch).item()

    batches = _batches(setup)
    steps, forwards = _timed(train, batches), _timed(read, batches)
    where = f"cpu ({torch.get_num_threads()} threads)" if device == "cpu" else torch.cuda.get_device_name()
    return Pace(sum(steps) / len(steps), sum(forwards) / len(forwards), len(steps), where)


def _batches(setup: Setup) -> list[dict[str, Any]]:
    """Rows drawn at random, those of like length in a batch as in a training; the batches in no order of length."""
    train, generator = setup.data["train"], torch.Generator().manual_seed(setup.seed)
    count = (NUM_WARMUP_STEPS + MAX_STEPS) * setup.batch_size
    drawn = train.select(torch.randperm(len(train), generator=generator)[:count].tolist())
    lengths = torch.tensor([len(ids) for ids in drawn["input_ids"]])
    drawn = drawn.select(lengths.argsort().tolist())
    batches = list(DataLoader(drawn, setup.batch_size, collate_fn=RowCollator(setup.tokenizer)))
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def _timed(work: Any, batches: list[dict[str, Any]]) -> list[float]:
    for batch in batches[:NUM_WARMUP_STEPS]:
        work(batch)
    seconds: list[float] = []
    for batch in batches[:MAX_STEPS]:
        start = time.perf_counter()
        work(batch)
        seconds.append(time.perf_counter() - start)
        if sum(seconds) > MAX_SECONDS:
            break
    return seconds
