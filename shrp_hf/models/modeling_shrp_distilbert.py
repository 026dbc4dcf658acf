"""DistilBERT with kept heads. Parameter names stay DistilBERT's."""

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
from .modeling_shrp import TEXT_HEADS, ShrpBaseMixin, ShrpHeadMixin, ShrpModelMixin, auto_map
from .slicing import SilentAttention


class ShrpDistilBertMixin(ShrpModelMixin):
    """What every Shrp DistilBERT class declares."""

    config: ShrpDistilBertConfig
    config_class = ShrpDistilBertConfig
    _can_record_outputs: ClassVar[dict] = {
        "hidden_states": TransformerBlock,
        "attentions": [DistilBertSelfAttention, SilentAttention],
    }
    auto_classes: ClassVar[Mapping[str, str]] = auto_map("DistilBert", *TEXT_HEADS)


class ShrpDistilBertModel(ShrpDistilBertMixin, ShrpBaseMixin, DistilBertModel):
    """The base encoder."""


class ShrpDistilBertHead(ShrpDistilBertMixin, ShrpHeadMixin):
    """What every task head declares."""

    base_model_class = ShrpDistilBertModel


class ShrpDistilBertForMaskedLM(ShrpDistilBertHead, DistilBertForMaskedLM):
    """A masked language model."""


class ShrpDistilBertForMultipleChoice(ShrpDistilBertHead, DistilBertForMultipleChoice):
    """A scorer of several continuations."""


class ShrpDistilBertForQuestionAnswering(ShrpDistilBertHead, DistilBertForQuestionAnswering):
    """A span extractor."""


class ShrpDistilBertForSequenceClassification(ShrpDistilBertHead, DistilBertForSequenceClassification):
    """A classifier or regressor of sequences."""


class ShrpDistilBertForTokenClassification(ShrpDistilBertHead, DistilBertForTokenClassification):
    """A classifier of every token."""
