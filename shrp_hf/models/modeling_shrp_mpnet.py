"""MPNet with expert layers, kept heads and neurons. Parameter names stay the stock ones."""

from collections.abc import Mapping
from typing import ClassVar

from transformers import (
    MPNetForMaskedLM,
    MPNetForMultipleChoice,
    MPNetForQuestionAnswering,
    MPNetForSequenceClassification,
    MPNetForTokenClassification,
    MPNetModel,
)

from .configuration_shrp_mpnet import ShrpMPNetConfig
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


class ShrpMPNetMixin(ShrpModelMixin):
    """What every Shrp MPNet class declares."""

    config: ShrpMPNetConfig
    config_class = ShrpMPNetConfig
    auto_classes: ClassVar[Mapping[str, str]] = auto_map("MPNet", *TEXT_HEADS)


class ShrpMPNetModel(ShrpMPNetMixin, ShrpBaseMixin, MPNetModel):
    """The base encoder; converts plain checkpoints through `from_pretrained(..., expert_layers=n)`."""

    forward = routed(MPNetModel.forward)


class ShrpMPNetHead(ShrpMPNetMixin, ShrpHeadMixin):
    """What every task head declares."""

    base_model_class = ShrpMPNetModel


class ShrpMPNetForMaskedLM(ShrpMPNetHead, MPNetForMaskedLM):
    """A masked language model."""

    forward = with_routing(MPNetForMaskedLM.forward, ShrpMaskedLMOutput)


class ShrpMPNetForMultipleChoice(ShrpMPNetHead, MPNetForMultipleChoice):
    """A scorer of several continuations."""

    forward = with_routing(MPNetForMultipleChoice.forward, ShrpMultipleChoiceOutput)


class ShrpMPNetForQuestionAnswering(ShrpMPNetHead, MPNetForQuestionAnswering):
    """A span extractor."""

    forward = with_routing(MPNetForQuestionAnswering.forward, ShrpQuestionAnsweringOutput)


class ShrpMPNetForSequenceClassification(ShrpMPNetHead, MPNetForSequenceClassification):
    """A classifier or regressor of sequences."""

    forward = with_routing(MPNetForSequenceClassification.forward, ShrpSequenceClassifierOutput)


class ShrpMPNetForTokenClassification(ShrpMPNetHead, MPNetForTokenClassification):
    """A classifier of every token."""

    forward = with_routing(MPNetForTokenClassification.forward, ShrpTokenClassifierOutput)
