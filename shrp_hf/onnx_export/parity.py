"""Whether an exported file does what the model does."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

SENTENCES = (
    "A gorgeous, witty, seductive movie.",
    "No.",
    "The plot is thin, the acting is wooden, and the two hours feel like four.",
    "It was the first time in years that the whole theatre stayed until the last line of the credits had gone by.",
    "Returns the eigenvalues of a symmetric matrix in ascending order.",
    "Which of the two films would you rather see again?",
    "She said that he said that they had never said anything of the kind.",
    "Terrible service, but the soup was fine.",
)
"""What is compared where the user gives no sentences."""

_NO_OUTPUT = ("loss", "hidden_states", "attentions", "router_logits", "balance_loss", "task_loss")
_ROWS = 16


def output_names(outputs: Mapping[str, Any]) -> list[str]:
    """The tensors that a model gives a server, in order: no loss, nothing that a trainer looks at."""
    return [name for name, value in outputs.items() if name not in _NO_OUTPUT and isinstance(value, torch.Tensor)]


def sample_batches(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, sentences: Sequence[str]
) -> list[dict[str, torch.Tensor]]:
    """Batches to compare on: all sentences padded, sixteen at a time, then the first one alone.

    Without a tokenizer they are random token ids, padded on the right, or random pixels.

    Returns:
        Inputs of the model: ids (batch, length), for multiple choice (batch, 2, length), or pixels.
    """
    config = model.config
    if model.main_input_name == "pixel_values":
        size = config.image_size if isinstance(config.image_size, Sequence) else (config.image_size,) * 2
        pixels = torch.randn(3, config.num_channels, *size, generator=torch.Generator().manual_seed(0))
        return [{"pixel_values": pixels}, {"pixel_values": pixels[:1]}]
    if tokenizer is None:
        batches = [_random_batch(config, 4, 11), _random_batch(config, 1, 7)]
    else:
        longest = min(tokenizer.model_max_length, config.max_position_embeddings - 2, 512)
        options = {"padding": True, "truncation": True, "max_length": longest, "return_tensors": "pt"}
        starts = range(0, len(sentences), _ROWS)
        batches = [dict(tokenizer(list(sentences[i : i + _ROWS]), **options)) for i in starts]
        batches.append(dict(tokenizer([sentences[0]], **options)))
    if type(model).__name__.endswith("ForMultipleChoice"):
        return [{name: torch.stack([x, x.flip(0)], dim=1) for name, x in batch.items()} for batch in batches]
    return batches


def _random_batch(config: Any, num_rows: int, length: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(num_rows)
    ids = torch.randint(config.vocab_size, (num_rows, length), generator=generator)
    padding = config.pad_token_id or 0
    ids[ids == padding] = (padding + 1) % config.vocab_size
    mask = (torch.arange(length) < torch.arange(length - num_rows + 1, length + 1)[:, None]).long()
    ids[mask == 0] = padding
    batch = {"input_ids": ids, "attention_mask": mask}
    return batch | ({"token_type_ids": torch.zeros_like(ids)} if getattr(config, "type_vocab_size", 1) > 1 else {})


class Comparison:
    """The outputs of a model and of an exported file, batch by batch.

    Args:
        expected: Per batch the model's outputs.
        found: Per batch those of the file.
        masks: Per batch 1 for real tokens, shape (batch, length), or None.
    """

    def __init__(
        self,
        expected: Sequence[Sequence[np.ndarray]],
        found: Sequence[Sequence[np.ndarray]],
        masks: Sequence[np.ndarray | None],
    ) -> None:
        self.pairs = [
            (_real(e, mask), _real(f, mask))
            for es, fs, mask in zip(expected, found, masks, strict=True)
            for e, f in zip(es, fs, strict=True)
        ]

    @property
    def difference(self) -> float:
        """Largest difference, as a share of the largest output (or of 1, where that is less); NaN counts as infinite."""
        worst = max(float(np.abs(f - e).max() / max(1.0, np.abs(e).max())) for e, f in self.pairs)
        return worst if np.isfinite(worst) else float("inf")

    def agreement(self, decides: bool) -> float:
        """How far the file agrees with the model, at most 1.

        Args:
            decides: Whether the largest output decides: the share of equal decisions. Else the mean cosine.
        """
        values = []
        for e, f in self.pairs:
            e, f = e.reshape(-1, e.shape[-1]), f.reshape(-1, f.shape[-1])
            if decides:
                values.append(e.argmax(-1) == f.argmax(-1))
            else:
                values.append((e * f).sum(-1) / np.maximum(np.linalg.norm(e, axis=-1) * np.linalg.norm(f, axis=-1), 1e-12))
        return float(np.concatenate(values).mean())


def _real(values: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """Leaves out what a model says of padding: nobody reads it."""
    if mask is None or values.ndim < 3 or values.shape[:2] != mask.shape:
        return values
    return values[mask.astype(bool)]
