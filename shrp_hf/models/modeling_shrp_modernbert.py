"""ModernBERT with expert layers, kept heads and neurons. Parameter names stay the stock ones."""

from collections.abc import Mapping
from typing import ClassVar

from torch import nn
from transformers import (
    ModernBertForMaskedLM,
    ModernBertForMultipleChoice,
    ModernBertForQuestionAnswering,
    ModernBertForSequenceClassification,
    ModernBertForTokenClassification,
    ModernBertModel,
)
from transformers.models.modernbert.modeling_modernbert import ModernBertAttention, ModernBertEncoderLayer, ModernBertMLP

from .configuration_shrp_modernbert import ShrpModernBertConfig
from .expert_attention import ExpertAttention
from .expert_layer import ExpertLayer
from .modeling_shrp import TEXT_HEADS, ShrpBaseMixin, ShrpHeadMixin, ShrpModelMixin, auto_map
from .routing import (
    ShrpMaskedLMOutput,
    ShrpMultipleChoiceOutput,
    ShrpQuestionAnsweringOutput,
    ShrpSequenceClassifierOutput,
    ShrpTokenClassifierOutput,
    routed,
    with_routing,
)
from .slicing import SilentAttention


class ShrpModernBertMixin(ShrpModelMixin):
    """What every Shrp ModernBERT class declares."""

    config: ShrpModernBertConfig
    config_class = ShrpModernBertConfig
    _can_record_outputs: ClassVar[dict] = {
        "hidden_states": [ModernBertEncoderLayer, ExpertLayer],
        "attentions": [ModernBertAttention, ExpertAttention, SilentAttention],
    }
    auto_classes: ClassVar[Mapping[str, str]] = auto_map("ModernBert", *TEXT_HEADS)

    def _init_weights(self, module: nn.Module) -> None:
        is_skipped = isinstance(module, ModernBertMLP) and not isinstance(module.Wo, nn.Linear)
        if not is_skipped:  # the stock method draws the weights of both matrices
            super()._init_weights(module)


class ShrpModernBertModel(ShrpModernBertMixin, ShrpBaseMixin, ModernBertModel):
    """The base encoder; converts plain checkpoints through `from_pretrained(..., expert_layers=n)`."""

    forward = routed(ModernBertModel.forward)


class ShrpModernBertHead(ShrpModernBertMixin, ShrpHeadMixin):
    """What every task head declares."""

    base_model_class = ShrpModernBertModel


class ShrpModernBertForMaskedLM(ShrpModernBertHead, ModernBertForMaskedLM):
    """A masked language model."""

    forward = with_routing(ModernBertForMaskedLM.forward, ShrpMaskedLMOutput)


class ShrpModernBertForMultipleChoice(ShrpModernBertHead, ModernBertForMultipleChoice):
    """A scorer of several continuations."""

    forward = with_routing(ModernBertForMultipleChoice.forward, ShrpMultipleChoiceOutput)


class ShrpModernBertForQuestionAnswering(ShrpModernBertHead, ModernBertForQuestionAnswering):
    """A span extractor."""

    forward = with_routing(ModernBertForQuestionAnswering.forward, ShrpQuestionAnsweringOutput)


class ShrpModernBertForSequenceClassification(ShrpModernBertHead, ModernBertForSequenceClassification):
    """A classifier or regressor of sequences."""

    forward = with_routing(ModernBertForSequenceClassification.forward, ShrpSequenceClassifierOutput)


class ShrpModernBertForTokenClassification(ShrpModernBertHead, ModernBertForTokenClassification):
    """A classifier of every token."""

    forward = with_routing(ModernBertForTokenClassification.forward, ShrpTokenClassifierOutput)
