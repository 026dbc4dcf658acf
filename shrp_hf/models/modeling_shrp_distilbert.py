"""DistilBERT with expert layers and kept heads. Parameter names stay DistilBERT's."""

from collections.abc import Mapping
from typing import ClassVar

from transformers import (
    DistilBertForMaskedLM,
    DistilBertForMultipleChoice,
    DistilBertForQuestionAnswering,
    DistilBertForSequenceClassification,
    DistilBertForTokenClassification,
    DistilBertModel,
)
from transformers.models.distilbert.modeling_distilbert import DistilBertSelfAttention, TransformerBlock

from .configuration_shrp_distilbert import ShrpDistilBertConfig
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


class ShrpDistilBertMixin(ShrpModelMixin):
    """What every Shrp DistilBERT class declares."""

    config: ShrpDistilBertConfig
    config_class = ShrpDistilBertConfig
    _can_record_outputs: ClassVar[dict] = {
        "hidden_states": [TransformerBlock, ExpertLayer],
        "attentions": [DistilBertSelfAttention, ExpertAttention, SilentAttention],
    }
    auto_classes: ClassVar[Mapping[str, str]] = auto_map("DistilBert", *TEXT_HEADS)


class ShrpDistilBertModel(ShrpDistilBertMixin, ShrpBaseMixin, DistilBertModel):
    """The base encoder; converts plain checkpoints through `from_pretrained(..., expert_layers=n)`."""

    forward = routed(DistilBertModel.forward)


class ShrpDistilBertHead(ShrpDistilBertMixin, ShrpHeadMixin):
    """What every task head declares."""

    base_model_class = ShrpDistilBertModel


class ShrpDistilBertForMaskedLM(ShrpDistilBertHead, DistilBertForMaskedLM):
    """A masked language model."""

    forward = with_routing(DistilBertForMaskedLM.forward, ShrpMaskedLMOutput)


class ShrpDistilBertForMultipleChoice(ShrpDistilBertHead, DistilBertForMultipleChoice):
    """A scorer of several continuations."""

    forward = with_routing(DistilBertForMultipleChoice.forward, ShrpMultipleChoiceOutput)


class ShrpDistilBertForQuestionAnswering(ShrpDistilBertHead, DistilBertForQuestionAnswering):
    """A span extractor."""

    forward = with_routing(DistilBertForQuestionAnswering.forward, ShrpQuestionAnsweringOutput)


class ShrpDistilBertForSequenceClassification(ShrpDistilBertHead, DistilBertForSequenceClassification):
    """A classifier or regressor of sequences."""

    forward = with_routing(DistilBertForSequenceClassification.forward, ShrpSequenceClassifierOutput)


class ShrpDistilBertForTokenClassification(ShrpDistilBertHead, DistilBertForTokenClassification):
    """A classifier of every token."""

    forward = with_routing(DistilBertForTokenClassification.forward, ShrpTokenClassifierOutput)
