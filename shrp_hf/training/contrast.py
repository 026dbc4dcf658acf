"""A contrastive finish: texts that belong together draw near, the others of a batch stay away."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

from shrp_hf.models.outputs import POSITIVE, vectors_of
from shrp_hf.training.finite import FiniteTrainer

EPOCHS, LEARNING_RATE = 1.0, 2e-5
SCALE = 20.0  # of cosines, as sentence-transformers' MultipleNegativesRankingLoss has it


class PairTrainer(FiniteTrainer):
    """Trains an embedding model on pairs, by batches as `PairCollator` makes them."""

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The `contrastive_loss` of the batch, whatever `num_items_in_batch` says: there are no labels to count."""
        outputs = model(**inputs)
        loss = contrastive_loss(vectors_of(self.accelerator.unwrap_model(model), outputs, inputs.get("attention_mask")))
        return (loss, outputs) if return_outputs else loss


class PairCollator:
    """Pads the texts of rows, and behind them those that belong to them, to one batch.

    Args:
        tokenizer: Pads the tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        """Makes a batch of twice as many sequences as rows."""
        texts = [{"input_ids": row[name]} for name in ("input_ids", POSITIVE) for row in features]
        return dict(self.tokenizer.pad(texts, return_tensors="pt"))


def contrastive_loss(vectors: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of telling each text's own partner from the partners of the others, by scaled cosines.

    Args:
        vectors: Shape (2 pairs, width): the texts, then their partners in the same order.

    Returns:
        A scalar; 0 for a single pair.
    """
    own, partners = functional.normalize(vectors, dim=-1).chunk(2)
    return functional.cross_entropy(SCALE * own @ partners.T, torch.arange(len(own), device=vectors.device))
