"""Word embeddings of half or a quarter of the size, turned back row by row as they are read."""

import copy

import torch
from torch import nn
from transformers import PreTrainedModel


class SmallEmbedding(nn.Module):
    """An embedding whose rows are kept in float16, or in int8 with a scale each.

    Args:
        embedding: The embedding; its weight has shape (tokens, width).
        precision: "float16" or "int8".
    """

    def __init__(self, embedding: nn.Embedding, precision: str) -> None:
        super().__init__()
        weight = embedding.weight.detach()
        self.padding_idx = embedding.padding_idx  # some families read their positions off it
        if precision == "float16":
            largest = torch.finfo(torch.float16).max
            self.register_buffer("rows", weight.clamp(-largest, largest).half())
            self.register_buffer("scales", None)
            return
        scales = weight.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / 127
        self.register_buffer("rows", (weight / scales).round().to(torch.int8))
        self.register_buffer("scales", scales)  # (tokens, 1)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Maps ids of any shape to (..., width) in float32."""
        rows = nn.functional.embedding(ids, self.rows).float()
        return rows if self.scales is None else rows * nn.functional.embedding(ids, self.scales)

    def restored(self) -> torch.Tensor:
        """All rows as they are read, (tokens, width) in float32."""
        rows = self.rows.float()
        return rows if self.scales is None else rows * self.scales


def with_small_embeddings(model: PreTrainedModel, precision: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Returns two copies of `model` in float32 on the CPU: one that keeps its word embeddings small, and one rounded alike.

    A decoder that is tied to the embeddings stays as it is: its rows are read as a product, not one by one.

    Args:
        model: A text model; left as it is.
        precision: "float16" or "int8".

    Raises:
        ValueError: It has no word embeddings.
    """
    small = copy.deepcopy(model).to("cpu", torch.float32).eval()
    embedding = small.base_model.get_input_embeddings() if model.main_input_name == "input_ids" else None
    if not isinstance(embedding, nn.Embedding):
        raise ValueError(
            f"`embeddings` must be float32 for `{type(model).__name__}`, which reads no words, got {precision!r}."
        )
    made = SmallEmbedding(embedding, precision)
    small.base_model.set_input_embeddings(made)
    rounded = copy.deepcopy(small)
    plain = copy.deepcopy(embedding)
    plain.weight = nn.Parameter(made.restored(), requires_grad=False)
    rounded.base_model.set_input_embeddings(plain)
    return small, rounded
