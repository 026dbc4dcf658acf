"""Routed forward passes: stock models that tell their routers which tokens are real, and pass on what the routers said."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
    ImageClassifierOutput,
    MaskedLMOutput,
    ModelOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)

from .expert_attention import named_arguments
from .expert_layer import ROUTING, ExpertLayer, Routing, load_balancing_loss, sum_over_processes


@dataclass
class RoutingOutput(ModelOutput):
    """Fields that a routed model adds to its family's output.

    Args:
        router_logits: One tensor (batch, experts) per running expert layer, ascending.
        balance_loss: Bidirectional KL of the batch, over all processes in training; not yet weighted.
        task_loss: The loss without the balance loss.
    """

    router_logits: tuple[torch.FloatTensor, ...] | None = None
    balance_loss: torch.FloatTensor | None = None
    task_loss: torch.FloatTensor | None = None


@dataclass
class ShrpModelOutput(RoutingOutput, BaseModelOutputWithPooling):
    """Output of a base model."""


@dataclass
class ShrpImageClassifierOutput(RoutingOutput, ImageClassifierOutput):
    """Output of a classifier of images."""


@dataclass
class ShrpMaskedLMOutput(RoutingOutput, MaskedLMOutput):
    """Output of a masked language model."""


@dataclass
class ShrpMultipleChoiceOutput(RoutingOutput, MultipleChoiceModelOutput):
    """Output of a multiple-choice model."""


@dataclass
class ShrpQuestionAnsweringOutput(RoutingOutput, QuestionAnsweringModelOutput):
    """Output of a span extractor."""


@dataclass
class ShrpSequenceClassifierOutput(RoutingOutput, SequenceClassifierOutput):
    """Output of a sequence classifier."""


@dataclass
class ShrpTokenClassifierOutput(RoutingOutput, TokenClassifierOutput):
    """Output of a token classifier."""


def routed(stock_forward: Callable) -> Callable:
    """Wraps the forward of a stock base model: the same, and a routed model adds `router_logits` and `balance_loss`.

    Routers average over the real tokens, so a routed model needs an `attention_mask` of shape (batch, length), or none.
    """
    arguments = named_arguments(stock_forward)[1:]

    @wraps(stock_forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> ModelOutput | tuple:
        if not self.config.is_routed:
            return stock_forward(self, *args, **kwargs)
        given = dict(zip(arguments, args, strict=False)) | kwargs
        as_dict = given.pop("return_dict", None)
        around = ROUTING.get()
        routing = Routing(self) if around is None or around.model is not self else around
        routing.token_mask = _token_mask(given.get("attention_mask"))
        token = ROUTING.set(routing)
        try:
            output = stock_forward(self, **given, return_dict=True)
        finally:
            ROUTING.reset(token)
        if routing.logits:
            routing.balance_loss = account_routing(self, tuple(routing.logits))
            output = ShrpModelOutput(**output)
            output["router_logits"] = tuple(routing.logits)
            output["balance_loss"] = routing.balance_loss
        as_dict = self.config.return_dict if as_dict is None else as_dict
        return output if as_dict else output.to_tuple()

    return forward


def with_routing(stock_forward: Callable, output_class: type[ModelOutput]) -> Callable:
    """Wraps the forward of a stock task head: the same, plus what the routers said.

    In training the loss includes the balance loss, weighted by `config.router_aux_loss_coef`.
    """

    @wraps(stock_forward)
    def forward(self: Any, *args: Any, return_dict: bool | None = None, **kwargs: Any) -> ModelOutput | tuple:
        as_dict = self.config.return_dict if return_dict is None else return_dict
        if not self.config.is_routed:
            return stock_forward(self, *args, return_dict=as_dict, **kwargs)
        routing = Routing(self.base_model)
        token = ROUTING.set(routing)
        try:
            output = output_class(**stock_forward(self, *args, return_dict=True, **kwargs))
        finally:
            ROUTING.reset(token)
        if routing.balance_loss is not None:
            output["router_logits"] = tuple(routing.logits)
            output["balance_loss"] = routing.balance_loss
            if output.loss is not None:
                output["task_loss"] = output.loss
                if self.training:
                    output["loss"] = output.loss + self.config.router_aux_loss_coef * output.balance_loss
        return output if as_dict else output.to_tuple()

    return forward


def _token_mask(mask: Any) -> torch.Tensor | None:
    """Returns the mask of the real tokens, (batch, length), or None.

    Raises:
        ValueError: It has another shape.
    """
    if mask is not None and (not isinstance(mask, torch.Tensor) or mask.dim() != 2):
        found = tuple(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise ValueError(f"A routed model needs an `attention_mask` of shape (batch, length), got {found}.")
    return mask


def account_routing(model: Any, router_logits: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Returns the balance loss and, in training, counts the usage; once a batch, outside any checkpointed layer.

    Args:
        model: The base model.
        router_logits: One tensor (batch, experts) for each router that ran, ascending.

    Raises:
        ValueError: The routers get no gradient.
    """
    logits = torch.stack(router_logits)  # (layers, batch, experts)
    probabilities = logits.softmax(dim=-1)
    if not (model.training and torch.is_grad_enabled()):
        return load_balancing_loss(probabilities.mean(dim=1))
    layers = _routed_layers(model)
    if not logits.requires_grad and any(layer.router.weight.requires_grad for layer in layers):
        raise ValueError(
            "The routers get no gradient: reentrant gradient checkpointing cuts it. Set "
            '`gradient_checkpointing_kwargs={"use_reentrant": False}`.'
        )
    experts = logits.detach().topk(model.config.experts_per_sequence, dim=-1).indices  # (layers, batch, k)
    counts = torch.zeros_like(logits[:, 0]).scatter_add_(
        1, experts.flatten(1), torch.ones_like(experts.flatten(1), dtype=logits.dtype)
    )
    size = logits.new_full((len(logits), 1), logits.shape[1])
    total = sum_over_processes(torch.cat([probabilities.sum(dim=1), counts, size], dim=1))
    num_experts = logits.shape[-1]
    with torch.no_grad():
        for layer, count in zip(layers, total[:, num_experts:-1], strict=True):
            layer.router.usage += count.round().to(torch.int64)
    return load_balancing_loss(total[:, :num_experts] / total[:, -1:])


def _routed_layers(model: Any) -> list[nn.Module]:
    return [layer for layer in model.layers if isinstance(layer, ExpertLayer) and layer.active and layer.router is not None]
