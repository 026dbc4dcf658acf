"""RoBERTa (XLM-R, CamemBERT) with expert layers and kept heads. Parameter names stay RoBERTa's."""

from collections.abc import Mapping
from typing import ClassVar

from transformers import (
    RobertaForMaskedLM,
    RobertaForMultipleChoice,
    RobertaForQuestionAnswering,
    RobertaForSequenceClassification,
    RobertaForTokenClassification,
    RobertaModel,
)
from transformers.models.roberta.modeling_roberta import RobertaLayer, RobertaSelfAttention

from .configuration_shrp_roberta import ShrpRobertaConfig
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


class ShrpRobertaMixin(ShrpModelMixin):
    """What every Shrp RoBERTa class declares."""

    config: ShrpRobertaConfig
    config_class = ShrpRobertaConfig
    _can_record_outputs: ClassVar[dict] = {
        "hidden_states": [RobertaLayer, ExpertLayer],
        "attentions": [RobertaSelfAttention, ExpertAttention, SilentAttention],
    }
    auto_classes: ClassVar[Mapping[str, str]] = auto_map("Roberta", *TEXT_HEADS)


class ShrpRobertaModel(ShrpRobertaMixin, ShrpBaseMixin, RobertaModel):
    """The base encoder; converts plain checkpoints through `from_pretrained(..., expert_layers=n)`."""

    _no_split_modules: ClassVar[list[str]] = ["RobertaEmbeddings", "RobertaLayer"]
    forward = routed(RobertaModel.forward)


class ShrpRobertaHead(ShrpRobertaMixin, ShrpHeadMixin):
    """What every task head declares."""

    base_model_class = ShrpRobertaModel


class ShrpRobertaForMaskedLM(ShrpRobertaHead, RobertaForMaskedLM):
    """A masked language model."""

    forward = with_routing(RobertaForMaskedLM.forward, ShrpMaskedLMOutput)


class ShrpRobertaForMultipleChoice(ShrpRobertaHead, RobertaForMultipleChoice):
    """A scorer of several continuations."""

    forward = with_routing(RobertaForMultipleChoice.forward, ShrpMultipleChoiceOutput)


class ShrpRobertaForQuestionAnswering(ShrpRobertaHead, RobertaForQuestionAnswering):
    """A span extractor."""

    forward = with_routing(RobertaForQuestionAnswering.forward, ShrpQuestionAnsweringOutput)


class ShrpRobertaForSequenceClassification(ShrpRobertaHead, RobertaForSequenceClassification):
    """A classifier or regressor on the pooled output."""

    forward = with_routing(RobertaForSequenceClassification.forward, ShrpSequenceClassifierOutput)


class ShrpRobertaForTokenClassification(ShrpRobertaHead, RobertaForTokenClassification):
    """A classifier of every token."""

    forward = with_routing(RobertaForTokenClassification.forward, ShrpTokenClassifierOutput)
