"""What a student owes its teacher: the terms of knowledge distillation."""

import copy
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from shrp_hf.families import head_layout
from shrp_hf.models.outputs import (
    MULTI_LABEL,
    REGRESSION,
    SINGLE_LABEL,
    predicts_per_token,
    problem_type,
    task_head,
    vectors_of,
)

logger = logging.getLogger(__name__)


def logits_loss(
    student: torch.Tensor,
    teacher: torch.Tensor,
    temperature: float,
    kind: str = SINGLE_LABEL,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """What the student's logits are from the teacher's, by the kind of task.

    One class of several: T^2 KL(teacher || student) of their softmax at temperature T (Hinton et al. 2015). Several labels
    at once: T^2 times the binary cross-entropy with the teacher's probabilities, sigmoid(logits / T); where both agree it
    is the teacher's own entropy, not 0. Regression: the squared error, without T.

    Args:
        student: Shape (..., labels).
        teacher: The same shape.
        temperature: T, more than 0.
        kind: As `shrp_hf.models.outputs.problem_type` names it.
        mask: Shape (...), 1 for the predictions that count; or the shape of the logits, 1 for the classes that may be
            chosen. None: all.

    Returns:
        A scalar, the mean over predictions (and over labels, where each is a prediction of its own); 0 where none counts.

    Raises:
        ValueError: The shapes differ.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"The teacher's logits have the shape {tuple(teacher.shape)}, the student's {tuple(student.shape)}: teacher and "
            "student must have the same labels."
        )
    student, teacher = _wide(student), _wide(teacher)
    if kind == REGRESSION:
        error = (student - teacher).square().mean(dim=-1)
    elif kind == MULTI_LABEL:
        probabilities = (teacher / temperature).sigmoid()
        error = functional.binary_cross_entropy_with_logits(student / temperature, probabilities, reduction="none")
        error = temperature**2 * error.mean(dim=-1)
    else:
        log_p, log_q = student / temperature, teacher / temperature
        if mask is not None and mask.shape == student.shape:
            log_p, log_q = (x.masked_fill(mask == 0, torch.finfo(x.dtype).min) for x in (log_p, log_q))
            mask = None
        log_p, log_q = log_p.log_softmax(dim=-1), log_q.log_softmax(dim=-1)
        error = temperature**2 * (log_q.exp() * (log_q - log_p)).sum(dim=-1)
    return _mean(error, mask)


def vectors_loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Squared distance of each sentence's vector from the teacher's, as a share of the teacher's squared length.

    Of vectors of length 1 it is 2 (1 - cosine).

    Args:
        student: Shape (batch, width).
        teacher: The same shape.

    Returns:
        A scalar, the mean over sentences.

    Raises:
        ValueError: The shapes differ.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"The teacher's vectors have the shape {tuple(teacher.shape)}, the student's {tuple(student.shape)}: they must "
            "have the same width and pooling."
        )
    student, teacher = _wide(student), _wide(teacher)
    length = teacher.square().sum(dim=-1).clamp(min=torch.finfo(teacher.dtype).tiny)
    return ((student - teacher).square().sum(dim=-1) / length).mean()


def outputs_loss(
    model: nn.Module, inputs: Mapping[str, Any], student: Mapping[str, Any], teacher: Mapping[str, Any], temperature: float
) -> torch.Tensor | int:
    """`logits_loss` of a task head, summed over its outputs; padding and tokens with the label -100 are left out.

    Of an embedding model `vectors_loss`.

    Args:
        model: The student; what its logits mean is read from its head and config.
        inputs: The batch, with its labels where there are any.
        student: Outputs of the student.
        teacher: Outputs of the teacher.
        temperature: T.

    Returns:
        A scalar, 0 for a model without logits or vectors.

    Raises:
        ValueError: The outputs differ in name or shape.
    """
    vectors = [vectors_of(model, outputs, inputs.get("attention_mask")) for outputs in (student, teacher)]
    if vectors[0] is not None and vectors[1] is not None:
        return vectors_loss(*vectors)
    ours, theirs = student_logits(student), student_logits(teacher)
    if len(ours) != len(theirs):
        raise ValueError(f"The teacher gives {list(teacher)}, the student {list(student)}: they must have the same task head.")
    labels, mask = inputs.get("labels"), inputs.get("attention_mask")
    head, kind = task_head(model), problem_type(model, labels)
    if predicts_per_token(model):
        if labels is not None and labels.shape == ours[0].shape[:2]:
            mask = (labels != -100) if mask is None else mask * (labels != -100)
        if head == "PreTraining":  # one logit a token
            ours, theirs = ([x.unsqueeze(-1) for x in side] for side in (ours, theirs))
    elif head != "QuestionAnswering":  # whose classes are the tokens
        mask = None
    return sum(logits_loss(s, t, temperature, kind, mask) for s, t in zip(ours, theirs, strict=True))


def own_teacher(teacher: nn.Module, student: Any) -> nn.Module:
    """Returns the teacher, or a copy of it where it shares weights with the student, which would teach what it learns.

    Raises:
        ValueError: Their configs solve different problems, or name the same labels in another order.
    """
    config, other = getattr(teacher, "config", None), getattr(student, "config", None)
    kinds = [getattr(c, "problem_type", None) for c in (config, other)]
    if all(kinds) and kinds[0] != kinds[1]:
        raise ValueError(f"`teacher` has the `problem_type` {kinds[0]!r}, the model {kinds[1]!r}: they must be the same.")
    names = [getattr(c, "id2label", None) or {} for c in (config, other)]
    if names[0] != names[1] and sorted(names[0].values()) == sorted(names[1].values()):
        raise ValueError(
            f"`teacher` has the labels {names[0]}, the model {names[1]}, the same in another order: load the model with the "
            "teacher's `id2label` and `label2id`, and number the labels of the data alike."
        )
    if isinstance(student, nn.Module) and _storages(teacher) & _storages(student):
        logger.info("The teacher shares weights with the model: a copy of it, as it is now, teaches.")
        return copy.deepcopy(teacher)
    return teacher


def _storages(model: nn.Module) -> set[int]:
    return {weight.untyped_storage().data_ptr() for weight in model.parameters()} - {0}


def _wide(values: torch.Tensor) -> torch.Tensor:
    """In float32, or float64 where it is that."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _mean(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The mean of those that count, 0 where none does."""
    if mask is None:
        return values.mean()
    weights = mask.reshape(values.shape).to(values.dtype)
    return (values * weights).sum() / weights.sum().clamp(min=1)


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
        token_mask: Shape (batch, length) or (batch, choices, length), 1 for real tokens; None: all are.

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
    losses = [(_wide(s) - _wide(t)).square().mean(dim=-1) for s, t in pairs]
    return _mean(torch.stack(losses).mean(dim=0), token_mask)  # (batch, length)


def value_relations_loss(
    student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor], token_mask: torch.Tensor | None
) -> torch.Tensor:
    """KL(teacher || student) between the relations of the values, softmax(V V^T / sqrt(width)), over layers and real tokens.

    As in MiniLM (Wang et al. 2020, value-relation transfer), with one relation head, so that a layer with fewer heads
    than the teacher's has something to compare, and in every layer instead of the last.

    Args:
        student: Values per layer, shape (batch, length, any width).
        teacher: Values of as many layers or more, widths of their own; see `taught_by`.
        token_mask: Shape (batch, length) or (batch, choices, length), 1 for real tokens; None: all are.

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
    padding = None if token_mask is None else token_mask.reshape(-1, 1, token_mask.shape[-1]) == 0

    def relations(values: torch.Tensor) -> torch.Tensor:
        values = _wide(values)
        scores = values @ values.transpose(1, 2) / math.sqrt(values.shape[-1])  # (batch, length, length)
        if padding is not None:
            scores = scores.masked_fill(padding, torch.finfo(scores.dtype).min)
        return scores.log_softmax(dim=-1)

    losses = []
    for s, t in zip(student, taught_by(teacher, len(student)), strict=True):
        log_p, log_q = relations(s), relations(t)
        losses.append((log_q.exp() * (log_q - log_p)).sum(dim=-1))  # (batch, length)
    return _mean(torch.stack(losses).mean(dim=0), token_mask)


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
