"""Which rows a training draws and in which order, and which rows heads are scored on."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import DataLoader, Sampler, Subset
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase, TrainingArguments
from transformers.trainer_pt_utils import LengthGroupedSampler

from shrp_hf.models.outputs import IGNORED, JUDGED
from shrp_hf.training.arguments import ShrpTrainingArguments


def data_seed(args: TrainingArguments) -> int:
    """The seed of all that is drawn from a training set."""
    return args.seed if args.data_seed is None else args.data_seed


class RowCollator(DataCollatorWithPadding):
    """Pads rows to a batch, labels of tokens with -100; columns by which answers are judged are left out.

    Args:
        tokenizer: Pads the tokens.
    """

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        """Makes a batch of tensors (batch, length), the labels (batch,), (batch, labels) or, of tokens, (batch, length)."""
        features = [{name: value for name, value in row.items() if name != JUDGED} for row in features]
        name = next((name for name in ("label", "labels") if name in features[0]), None)
        if name is None or not _is_per_token(features[0][name], features[0]["input_ids"]):
            return super().__call__(features)
        labels = [torch.as_tensor(row.pop(name)) for row in features]
        batch = super().__call__(features)
        width = batch["input_ids"].shape[1]
        is_left = self.tokenizer.padding_side == "left"
        batch["labels"] = torch.full((len(labels), width), IGNORED)
        for row, own in zip(batch["labels"], labels, strict=True):
            row[width - len(own) if is_left else 0 :][: len(own)] = own
        return batch


def _is_per_token(label: Any, tokens: Any) -> bool:
    """Whether a label is a class for each token; several labels and relevances are floats."""
    label = label.tolist() if hasattr(label, "tolist") else label
    return isinstance(label, list) and len(label) == len(tokens) and all(isinstance(value, int) for value in label)


class EpochSampler(Sampler[int]):
    """Draws each epoch from a seed of its own, so that a run resumed within an epoch sees the rows that are left of it.

    Trainer groups by length with the global generator, whose state at the start of that epoch no checkpoint holds. As in
    accelerate's own sampler, the seed of an epoch is the run's plus its number.

    Args:
        sampler: Groups by length.
        seed: The run's.
        epoch: Gives the number of the epoch that begins, from 0.
    """

    def __init__(self, sampler: LengthGroupedSampler, seed: int, epoch: Callable[[], int]) -> None:
        self.sampler = sampler
        self.seed = seed
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        self.sampler.generator = torch.Generator().manual_seed(self.seed + self.epoch())
        return iter(self.sampler)


def calibration_batches(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, count: int, *, batch_size: int, seed: int
) -> DataLoader:
    """Draws the rows that heads are scored on.

    Args:
        rows: Tokenised rows, as from `Task.tokenize`.
        tokenizer: Pads the batches.
        count: How many rows, or all where there are fewer.
        batch_size: Rows of a batch.
        seed: Seed of the draw.

    Returns:
        Batches as `RowCollator` makes them.
    """
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    return DataLoader(rows.select(order[:count].tolist()), batch_size, collate_fn=RowCollator(tokenizer))


def hold_out(dataset: Any, args: TrainingArguments) -> tuple[Any, Any]:
    """Cuts a seeded slice off a training set, on which `ShrpTrainer.usage_plan` counts.

    Args:
        dataset: The training set.
        args: Its `usage_holdout` is the slice's share, at least one row.

    Returns:
        The rest and the slice, both in the order of the set; the whole and None where it has no length or one row.
    """
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        return dataset, None
    share = getattr(args, "usage_holdout", ShrpTrainingArguments.usage_holdout)
    size = max(1, round(share * len(dataset)))
    if size >= len(dataset):
        return dataset, None
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(data_seed(args))).tolist()
    chosen, rest = sorted(order[:size]), sorted(order[size:])
    if hasattr(dataset, "select"):
        return dataset.select(rest), dataset.select(chosen)
    return Subset(dataset, rest), Subset(dataset, chosen)
