"""DeBERTa-v2 and v3 with expert layers, kept heads and neurons. Parameter names stay the stock ones."""

from collections.abc import Mapping
from typing import ClassVar

from transformers import (
    DebertaV2ForMaskedLM,
    DebertaV2ForMultipleChoice,
    DebertaV2ForQuestionAnswering,
    DebertaV2ForSequenceClassification,
    DebertaV2ForTokenClassification,
    DebertaV2Model,
)

from .configuration_shrp_debertav2 import ShrpDebertaV2Config
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


class ShrpDebertaV2Mixin(ShrpModelMixin):
    """What every Shrp DeBERTa-v2 and v3 class declares."""

    config: ShrpDebertaV2Config
    config_class = ShrpDebertaV2Config
    auto_classes: ClassVar[Mapping[str, str]] = auto_map("DebertaV2", *TEXT_HEADS)


class ShrpDebertaV2Model(ShrpDebertaV2Mixin, ShrpBaseMixin, DebertaV2Model):
    """The base encoder; converts plain checkpoints through `from_pretrained(..., expert_layers=n)`."""

    forward = routed(DebertaV2Model.forward)


class ShrpDebertaV2Head(ShrpDebertaV2Mixin, ShrpHeadMixin):
    """What every task head declares."""

    base_model_class = ShrpDebertaV2Model


class ShrpDebertaV2ForMaskedLM(ShrpDebertaV2Head, DebertaV2ForMaskedLM):
    """A masked language model."""

    forward = with_routing(DebertaV2ForMaskedLM.forward, ShrpMaskedLMOutput)


class ShrpDebertaV2ForMultipleChoice(ShrpDebertaV2Head, DebertaV2ForMultipleChoice):
    """A scorer of several continuations."""

    forward = with_routing(DebertaV2ForMultipleChoice.forward, ShrpMultipleChoiceOutput)


class ShrpDebertaV2ForQuestionAnswering(ShrpDebertaV2Head, DebertaV2ForQuestionAnswering):
    """A span extractor."""

    forward = with_routing(DebertaV2ForQuestionAnswering.forward, ShrpQuestionAnsweringOutput)


class ShrpDebertaV2ForSequenceClassification(ShrpDebertaV2Head, DebertaV2ForSequenceClassification):
    """A classifier or regressor of sequences."""

    forward = with_routing(DebertaV2ForSequenceClassification.forward, ShrpSequenceClassifierOutput)


class ShrpDebertaV2ForTokenClassification(ShrpDebertaV2Head, DebertaV2ForTokenClassification):
    """A classifier of every token."""

    forward = with_routing(DebertaV2ForTokenClassification.forward, ShrpTokenClassifierOutput)
