"""What a student owes its teacher: the terms of knowledge distillation."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional

from shrp_hf.families import head_layout


def logits_loss(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """T^2 KL(teacher || student) at temperature T, or the mean squared error where there is one logit (regression).

    Args:
        student: Shape (..., labels).
        teacher: The same shape.
        temperature: T, more than 0 (Hinton et al. 2015).

    Returns:
        A scalar, mean over everything but the labels.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"The teacher's logits have the shape {tuple(teacher.shape)}, the student's {tuple(student.shape)}: teacher and "
            "student must have the same labels."
        )
    if student.shape[-1] == 1:
        return functional.mse_loss(student, teacher)
    log_p = functional.log_softmax(student.float() / temperature, dim=-1).flatten(0, -2)
    log_q = functional.log_softmax(teacher.float() / temperature, dim=-1).flatten(0, -2)
    return functional.kl_div(log_p, log_q, reduction="batchmean", log_target=True) * temperature**2


def taught_by(teacher: Sequence[torch.Tensor], num_layers: int) -> list[torch.Tensor]:
    """The teacher's layers that a student of `num_layers` follows: evenly spaced, the last by the last.

    Layer i of k follows layer ceil(i n / k) of n, counted from 1 (TinyBERT, Jiao et al. 2020, its uniform map); where
    k is n, each its own.

    Args:
        teacher: One tensor per layer, of any shape, embeddings left out.
        num_layers: Layers of the student, at most the teacher's.

    Returns:
        `num_layers` of the teacher's tensors.
    """
    return [teacher[-(-i * len(teacher) // num_layers) - 1] for i in range(1, num_layers + 1)]


def hidden_states_loss(
    student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor], token_mask: torch.Tensor | None
) -> torch.Tensor:
    """Mean squared error between the hidden states of student and teacher, over layers and real tokens.

    Args:
        student: Per layer (and embeddings first) the shape (batch, length, hidden).
        teacher: The same shapes, of as many layers or more; see `taught_by`.
        token_mask: Shape (batch, length), 1 for real tokens.

    Returns:
        A scalar.

    Raises:
        ValueError: The teacher has fewer layers, or another width.
    """
    if len(student) > len(teacher) or student[0].shape != teacher[0].shape:
        raise ValueError(
            f"The teacher has {len(teacher) - 1} layers of width {teacher[0].shape[-1]}, the student {len(student) - 1} of "
            f"{student[0].shape[-1]}: set `distillation_hidden_states=0`, or take a teacher of the same width, with as many "
            "layers or more."
        )
    pairs = zip(student[1:], taught_by(teacher[1:], len(student) - 1), strict=True)
    losses = [(s.float() - t.float()).square().mean(dim=-1) for s, t in pairs]
    error = torch.stack(losses).mean(dim=0)  # (batch, length)
    if token_mask is None:
        return error.mean()
    weights = token_mask.view_as(error).to(error.dtype)
    return (error * weights).sum() / weights.sum().clamp(min=1)


def value_relations_loss(
    student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor], token_mask: torch.Tensor | None
) -> torch.Tensor:
    """KL(teacher || student) between the relations of the values, softmax(V V^T / sqrt(width)), over layers and real tokens.

    As in MiniLM (Wang et al. 2020, value-relation transfer), with one relation head, so that a layer with fewer heads
    than the teacher's has something to compare, and in every layer instead of the last.

    Args:
        student: Values per layer, shape (batch, length, any width).
        teacher: Values of as many layers or more, widths of their own; see `taught_by`.
        token_mask: Shape (batch, length), 1 for real tokens.

    Returns:
        A scalar.

    Raises:
        ValueError: The teacher has fewer layers.
    """
    if len(student) > len(teacher):
        raise ValueError(
            f"The teacher has {len(teacher)} layers, the student {len(student)}: set `distillation_value_relations=0`, or "
            "take a teacher with as many or more."
        )
    if token_mask is None:
        token_mask = torch.ones(teacher[0].shape[:2], device=teacher[0].device)
    weights = token_mask.to(torch.float32)
    padding = (1 - weights[:, None, :]) * torch.finfo(torch.float32).min

    def relations(values: torch.Tensor) -> torch.Tensor:
        values = values.float()
        return (values @ values.transpose(1, 2) / math.sqrt(values.shape[-1]) + padding).log_softmax(dim=-1)

    losses = []
    for s, t in zip(student, taught_by(teacher, len(student)), strict=True):
        log_p, log_q = relations(s), relations(t)
        losses.append((log_q.exp() * (log_q - log_p)).sum(dim=-1))  # (batch, length)
    return (torch.stack(losses).mean(dim=0) * weights).sum() / weights.sum().clamp(min=1)


@contextmanager
def recorded_values(model: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Yields a list to which a forward pass in the block adds each layer's values, shape (batch, length, width)."""
    layout = head_layout(model)
    values: list[torch.Tensor] = []
    value = layout.layer_map.heads_in[2]
    handles = [
        layer.get_submodule(value.path).register_forward_hook(lambda _, __, out: values.append(value.of(out, dim=-1)))
        for layer in layout.layers
    ]
    try:
        yield values
    finally:
        for handle in handles:
            handle.remove()


def student_logits(outputs: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """The logits of any task head: one tensor, or start and end for question answering."""
    return [outputs[name] for name in ("logits", "start_logits", "end_logits") if outputs.get(name) is not None]
