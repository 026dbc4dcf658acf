"""What BERT and RoBERTa share: an encoder with expert layers, and task heads that pass on what the routers said."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import nn
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
    MaskedLMOutput,
    ModelOutput,
    MultipleChoiceModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .expert_layer import ExpertLayer, load_balancing_loss, sum_over_processes
from .modeling_shrp import ShrpModelMixin


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


class ShrpEncoder(nn.Module):
    """Runs the layers, ordinary and expert.

    Args:
        layers: The layers.
    """

    def __init__(self, layers: nn.ModuleList) -> None:
        super().__init__()
        self.layer = layers

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        token_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Maps (batch, length, hidden) to the same shape, and returns the logits of the routers that ran."""
        router_logits = ()
        for layer in self.layer:
            if isinstance(layer, ExpertLayer):
                hidden_states, logits = layer(hidden_states, attention_mask, token_mask, **kwargs)
                router_logits += () if logits is None else (logits,)
            else:
                hidden_states = layer(hidden_states, attention_mask, **kwargs)
        return hidden_states, router_logits


class ShrpTextModel(ShrpModelMixin):
    """The base model: stock embeddings and pooler around a `ShrpEncoder`. Mixed in before the stock class."""

    def __init__(self, config: Any, add_pooling_layer: bool = True) -> None:
        super().__init__(config, add_pooling_layer=add_pooling_layer)
        self._build_layers_()
        self.encoder = ShrpEncoder(self.encoder.layer)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        routing_record: list | None = None,
        **kwargs: Any,
    ) -> ShrpModelOutput:
        """As the stock model; a routed model adds `router_logits` and `balance_loss`.

        Args:
            input_ids: Shape (batch, length).
            attention_mask: Shape (batch, length), 1 for real tokens.
            token_type_ids: Shape (batch, length).
            position_ids: Shape (batch, length).
            inputs_embeds: Shape (batch, length, hidden), instead of `input_ids`.
            routing_record: A list to which the output is appended, for task heads whose stock forward drops it.
            **kwargs: Passed on to the layers.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        embeddings = self.embeddings(
            input_ids=input_ids,
            position_ids=position_ids,
            token_type_ids=token_type_ids,
            inputs_embeds=inputs_embeds,
        )
        if self.config.is_routed and attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError(
                f"A routed model needs an `attention_mask` of shape (batch, length), got {tuple(attention_mask.shape)}."
            )
        layer_mask = create_bidirectional_mask(config=self.config, inputs_embeds=embeddings, attention_mask=attention_mask)
        kwargs.pop("use_cache", None)
        hidden_states, router_logits = self.encoder(embeddings, layer_mask, attention_mask, **kwargs)
        pooled = self.pooler(hidden_states) if self.pooler is not None else None
        output = ShrpModelOutput(last_hidden_state=hidden_states, pooler_output=pooled)
        if router_logits:
            output["router_logits"] = router_logits
            output["balance_loss"] = self._account_routing(router_logits)
        if routing_record is not None:
            routing_record.append(output)
        return output

    def _account_routing(self, router_logits: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Returns the balance loss and, in training, counts the usage; once a batch, outside any checkpointed layer."""
        logits = torch.stack(router_logits)  # (layers, batch, experts)
        probabilities = logits.softmax(dim=-1)
        if not (self.training and torch.is_grad_enabled()):
            return load_balancing_loss(probabilities.mean(dim=1))
        if not logits.requires_grad and any(layer.router.weight.requires_grad for layer in self._routed_layers()):
            raise ValueError(
                "The routers get no gradient: reentrant gradient checkpointing cuts it. Set "
                '`gradient_checkpointing_kwargs={"use_reentrant": False}`.'
            )
        experts = logits.detach().topk(self.config.experts_per_sequence, dim=-1).indices  # (layers, batch, k)
        counts = torch.zeros_like(logits[:, 0]).scatter_add_(
            1, experts.flatten(1), torch.ones_like(experts.flatten(1), dtype=logits.dtype)
        )
        size = logits.new_full((len(logits), 1), logits.shape[1])
        total = sum_over_processes(torch.cat([probabilities.sum(dim=1), counts, size], dim=1))
        num_experts = logits.shape[-1]
        with torch.no_grad():
            for layer, count in zip(self._routed_layers(), total[:, num_experts:-1], strict=True):
                layer.router.usage += count.round().to(torch.int64)
        return load_balancing_loss(total[:, :num_experts] / total[:, -1:])

    def _routed_layers(self) -> list[ExpertLayer]:
        return [layer for layer in self.layers if isinstance(layer, ExpertLayer) and layer.active and layer.router is not None]


def with_routing(stock_forward: Callable, output_class: type[ModelOutput]) -> Callable:
    """Wraps the forward of a stock task head: the same, plus what the routers said.

    In training the loss includes the balance loss, weighted by `config.router_aux_loss_coef`.
    """

    @wraps(stock_forward)
    def forward(self: nn.Module, *args: Any, return_dict: bool | None = None, **kwargs: Any) -> ModelOutput | tuple:
        record: list[ShrpModelOutput] = []
        output = output_class(**stock_forward(self, *args, return_dict=True, routing_record=record, **kwargs))
        if "router_logits" in record[0]:
            output["router_logits"] = record[0].router_logits
            output["balance_loss"] = record[0].balance_loss
            if output.loss is not None:
                output["task_loss"] = output.loss
                if self.training:
                    output["loss"] = output.loss + self.config.router_aux_loss_coef * output.balance_loss
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return output if as_dict else output.to_tuple()

    return forward
