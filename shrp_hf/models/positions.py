"""How a family's positions reach an expert: as they reached the head that it was."""

import sys
from collections.abc import Mapping
from typing import Any

import torch

Placed = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
"""Queries and keys (batch, k, length, head_size), and the mask that is added to the scores."""


def shared_bias(
    attention: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    experts: torch.Tensor | None,
    given: Mapping[str, Any],
) -> Placed:
    """Adds its own slice of a bias for all heads to an expert's scores (MPNet).

    Args:
        attention: The `ExpertAttention`.
        query: Shape (batch, k, length, head_size).
        key: Shape (batch, k, length, head_size).
        mask: What is added to the scores so far.
        experts: The chosen experts, shape (batch, k); None: all that the layer has.
        given: What else the stock attention is given, by name.
    """
    bias = given.get(attention.layer_map.head_bias)  # (batch, all heads, length, length)
    if bias is None:
        return query, key, mask
    if experts is not None:
        bias = bias.gather(1, experts[:, :, None, None].expand(-1, -1, *bias.shape[2:]))
    elif len(attention.heads) < bias.shape[1]:
        bias = bias[:, list(attention.heads)]
    return query, key, bias if mask is None else bias + mask


def rotary(
    attention: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    experts: torch.Tensor | None,
    given: Mapping[str, Any],
) -> Placed:
    """Turns queries and keys by their positions, the same for all heads; the arguments are those of `shared_bias`."""
    turn = sys.modules[attention.stock_module].apply_rotary_pos_emb
    return *turn(query, key, *given["position_embeddings"]), mask


def disentangled(
    attention: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor,
    experts: torch.Tensor | None,
    given: Mapping[str, Any],
) -> Placed:
    """Adds content-to-position and position-to-content scores, each expert by its own projections (DeBERTa-v2 and v3).

    Args:
        attention: The `ExpertAttention`.
        query: Shape (batch, k, length, head_size).
        key: Shape (batch, k, length, head_size).
        mask: Shape (batch, 1, length, length), 1 where a token may attend.
        experts: The chosen experts, shape (batch, k); None: all that the layer has.
        given: `relative_pos` (1, length, length) and `rel_embeddings` (2 * span, hidden), or None in both.
    """
    config = attention.config
    kinds, size = config.pos_att_type or (), query.shape[-1]
    # The stock class rounds this root to float32, in float64 too.
    scale = torch.sqrt(torch.tensor(size, dtype=torch.float32) * (1 + ("c2p" in kinds) + ("p2c" in kinds))).to(query.dtype)
    content = query / (scale * attention.scaling)  # the attention function scales it again
    # Half of the least number, because scores are added to it; a padded token attends to nothing, and must not be NaN.
    blocked, least = mask == 0, torch.finfo(query.dtype).min / 2
    bias = torch.zeros_like(mask, dtype=query.dtype)
    relative, embeddings = given.get("relative_pos"), given.get("rel_embeddings")
    if embeddings is None:
        return content, key, bias.masked_fill(blocked, least)
    span = _span(config)
    embeddings = attention.get_submodule("pos_dropout")(embeddings[: 2 * span])
    relative = relative.to(query.device, torch.long).view(1, 1, *relative.shape[-2:])
    names = {"c2p": "key_proj", "p2c": "query_proj"}
    if not config.share_att_key:
        names = {"c2p": "pos_key_proj", "p2c": "pos_query_proj"}
    for kind, states, sign in (("c2p", query, 1), ("p2c", key, -1)):
        if kind not in kinds:
            continue
        projected = attention.get_submodule(names[kind])(embeddings).unflatten(-1, (-1, size)).transpose(0, 1)
        projected = projected.unsqueeze(0) if experts is None else projected[experts]  # (batch or 1, k, 2 * span, head_size)
        index = (sign * relative + span).clamp(0, 2 * span - 1).expand(*states.shape[:3], -1)
        scores = (states @ projected.transpose(-1, -2)).gather(-1, index)  # (batch, k, length, length)
        bias = bias + (scores if kind == "c2p" else scores.transpose(-1, -2)) / scale
    return content, key, bias.masked_fill(blocked, least)


def _span(config: Any) -> int:
    """The number of relative positions to either side."""
    if config.position_buckets > 0:
        return config.position_buckets
    longest = config.max_relative_positions
    return longest if longest > 0 else config.max_position_embeddings
