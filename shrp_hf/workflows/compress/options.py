"""What a compression aims at, and how it trains."""

from dataclasses import asdict, dataclass
from typing import Any

from shrp_hf.defaults import BATCH_SIZE, DENSE_LEARNING_RATE, MAX_LENGTH, MAX_TRIALS, SEED, SERVED_SHAPE
from shrp_hf.training.recipes import RECIPES, Recipe
from shrp_hf.workflows.compress.candidates import STRUCTURES
from shrp_hf.workflows.compress.search import Targets

_FREE = ("targets", "structures", "max_trials", "force")


@dataclass(frozen=True)
class CompressOptions:
    """What a compression aims at, and how it trains.

    Args:
        targets: What must be reached.
        shape: Sequences and tokens per call at which speed is measured.
        device: Where speed is measured.
        structures: What a candidate may be, names in `STRUCTURES`; None: all that the model's family can be.
        experts: Numbers of experts per layer to consider; None: 1, 2, 4 and so on, up to all heads.
        max_trials: Most candidates to train.
        recipe: How they are converted and recovered.
        dense_epochs: Epochs of fine-tuning before; 0: the model is fine-tuned.
        dense_learning_rate: Learning rate of that.
        batch_size: Sequences per step.
        max_length: Longest sequence in tokens.
        examples_per_epoch: Examples that count as an epoch; None: the whole training set.
        seed: Seed of everything that is drawn.
        force: Go on with a dense model that is no better than the majority class.

    Raises:
        ValueError: `max_trials` is below 1, a structure is unknown, or `experts` are given where none may be.
    """

    targets: Targets
    shape: tuple[int, int] = SERVED_SHAPE
    device: str = "cpu"
    structures: tuple[str, ...] | None = None
    experts: tuple[int, ...] | None = None
    max_trials: int = MAX_TRIALS
    recipe: Recipe = RECIPES["default"]
    dense_epochs: float = 0.0
    dense_learning_rate: float = DENSE_LEARNING_RATE
    batch_size: int = BATCH_SIZE
    max_length: int = MAX_LENGTH
    examples_per_epoch: int | None = None
    seed: int = SEED
    force: bool = False

    def __post_init__(self) -> None:
        if self.max_trials < 1:
            raise ValueError(f"`max_trials` must be at least 1, got {self.max_trials}.")
        if self.structures is None:
            return
        if not self.structures or set(self.structures) - set(STRUCTURES):
            raise ValueError(f"`structures` must be some of {', '.join(STRUCTURES)}, got {list(self.structures)}.")
        if self.experts is not None and "experts" not in self.structures:
            raise ValueError(f"`experts` {list(self.experts)} is about expert layers, which `structures` leaves out.")

    @property
    def identity(self) -> dict[str, Any]:
        """What the trained candidates depend on: all but `_FREE`, which may be changed in one directory."""
        return {name: value for name, value in asdict(self).items() if name not in _FREE}
