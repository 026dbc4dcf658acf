"""Which rows a training draws, and in which order."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import Sampler, Subset
from transformers import TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler

from shrp_hf.training_args import ShrpTrainingArguments


class EpochSampler(Sampler[int]):
    """Draws each epoch from a seed of its own, so that a run resumed within an epoch sees the rows that are left of it.

    Trainer groups by length with the global generator, whose state at the start of that epoch no checkpoint holds.

    Args:
        sampler: Groups by length.
        seed: Gives the seed of the epoch that begins.
    """

    def __init__(self, sampler: LengthGroupedSampler, seed: Callable[[], int]) -> None:
        self.sampler = sampler
        self.seed = seed

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        self.sampler.generator = torch.Generator().manual_seed(self.seed())
        return iter(self.sampler)


def hold_out(dataset: Any, args: TrainingArguments) -> tuple[Any, Any]:
    """Cuts a seeded slice off a training set: (rest, slice). A set without a length is returned whole, with None."""
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        return dataset, None
    share = getattr(args, "usage_holdout", ShrpTrainingArguments.usage_holdout)
    size = max(1, round(share * len(dataset)))
    if size >= len(dataset):
        return dataset, None
    seed = args.seed if args.data_seed is None else args.data_seed
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen, rest = sorted(order[:size]), sorted(order[size:])
    if hasattr(dataset, "select"):
        return dataset.select(rest), dataset.select(chosen)
    return Subset(dataset, rest), Subset(dataset, chosen)
