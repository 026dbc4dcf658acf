"""What a student owes its teacher: the terms of knowledge distillation."""

from collections.abc import Mapping, Sequence

import torch
from torch.nn import functional


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


def hidden_states_loss(
    student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor], token_mask: torch.Tensor | None
) -> torch.Tensor:
    """Mean squared error between the hidden states of student and teacher, over layers and real tokens.

    Args:
        student: Per layer (and embeddings first) the shape (batch, length, hidden).
        teacher: The same shapes.
        token_mask: Shape (batch, length), 1 for real tokens.

    Returns:
        A scalar.
    """
    if [s.shape for s in student] != [t.shape for t in teacher]:
        raise ValueError(
            f"The teacher has {len(teacher) - 1} layers of width {teacher[0].shape[-1]}, the student {len(student) - 1} of "
            f"{student[0].shape[-1]}: set `distillation_hidden_states=0`, or take a teacher of the same shape."
        )
    losses = [(s.float() - t.float()).square().mean(dim=-1) for s, t in zip(student[1:], teacher[1:], strict=True)]
    error = torch.stack(losses).mean(dim=0)  # (batch, length)
    if token_mask is None:
        return error.mean()
    weights = token_mask.view_as(error).to(error.dtype)
    return (error * weights).sum() / weights.sum().clamp(min=1)


def student_logits(outputs: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """The logits of any task head: one tensor, or start and end for question answering."""
    return [outputs[name] for name in ("logits", "start_logits", "end_logits") if outputs.get(name) is not None]
