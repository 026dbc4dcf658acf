"""BERT with expert layers and kept heads. Parameter names stay BERT's."""

from collections.abc import Mapping
from typing import ClassVar

from transformers import (
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
)
from transformers.models.bert.modeling_bert import BertLayer, BertSelfAttention

from .configuration_shrp_bert import ShrpBertConfig
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


class ShrpBertMixin(ShrpModelMixin):
    """What every Shrp BERT class declares."""

    config: ShrpBertConfig
    config_class = ShrpBertConfig
    _can_record_outputs: ClassVar[dict] = {
        "hidden_states": [BertLayer, ExpertLayer],
        "attentions": [BertSelfAttention, ExpertAttention, SilentAttention],
    }
    auto_classes: ClassVar[Mapping[str, str]] = auto_map("Bert", *TEXT_HEADS)


class ShrpBertModel(ShrpBertMixin, ShrpBaseMixin, BertModel):
    """The base encoder; converts plain BERT checkpoints through `from_pretrained(..., expert_layers=n)`."""

    _no_split_modules: ClassVar[list[str]] = ["BertEmbeddings", "BertLayer"]
    forward = routed(BertModel.forward)


class ShrpBertHead(ShrpBertMixin, ShrpHeadMixin):
    """What every task head declares."""

    base_model_class = ShrpBertModel


class ShrpBertForMaskedLM(ShrpBertHead, BertForMaskedLM):
    """A masked language model."""

    forward = with_routing(BertForMaskedLM.forward, ShrpMaskedLMOutput)


class ShrpBertForMultipleChoice(ShrpBertHead, BertForMultipleChoice):
    """A scorer of several continuations."""

    forward = with_routing(BertForMultipleChoice.forward, ShrpMultipleChoiceOutput)


class ShrpBertForQuestionAnswering(ShrpBertHead, BertForQuestionAnswering):
    """A span extractor."""

    forward = with_routing(BertForQuestionAnswering.forward, ShrpQuestionAnsweringOutput)


class ShrpBertForSequenceClassification(ShrpBertHead, BertForSequenceClassification):
    """A classifier or regressor on the pooled output."""

    forward = with_routing(BertForSequenceClassification.forward, ShrpSequenceClassifierOutput)


class ShrpBertForTokenClassification(ShrpBertHead, BertForTokenClassification):
    """A classifier of every token."""

    forward = with_routing(BertForTokenClassification.forward, ShrpTokenClassifierOutput)
