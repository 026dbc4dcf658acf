"""ELECTRA with expert layers and kept heads. Parameter names stay ELECTRA's."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from transformers import (
    ElectraForMaskedLM,
    ElectraForMultipleChoice,
    ElectraForPreTraining,
    ElectraForQuestionAnswering,
    ElectraForSequenceClassification,
    ElectraForTokenClassification,
    ElectraModel,
)
from transformers.models.electra.modeling_electra import (
    ElectraForPreTrainingOutput,
    ElectraLayer,
    ElectraSelfAttention,
)

from .configuration_shrp_electra import ShrpElectraConfig
from .expert_attention import ExpertAttention
from .expert_layer import ExpertLayer
from .modeling_shrp import TEXT_HEADS, ShrpBaseMixin, ShrpHeadMixin, ShrpModelMixin, auto_map
from .routing import (
    RoutingOutput,
    ShrpMaskedLMOutput,
    ShrpMultipleChoiceOutput,
    ShrpQuestionAnsweringOutput,
    ShrpSequenceClassifierOutput,
    ShrpTokenClassifierOutput,
    routed,
    with_routing,
)
from .slicing import SilentAttention


@dataclass
class ShrpPreTrainingOutput(RoutingOutput, ElectraForPreTrainingOutput):
    """Output of the discriminator."""


class ShrpElectraMixin(ShrpModelMixin):
    """What every Shrp ELECTRA class declares."""

    config: ShrpElectraConfig
    config_class = ShrpElectraConfig
    _can_record_outputs: ClassVar[dict] = {
        "hidden_states": [ElectraLayer, ExpertLayer],
        "attentions": [ElectraSelfAttention, ExpertAttention, SilentAttention],
    }
    auto_classes: ClassVar[Mapping[str, str]] = auto_map("Electra", *TEXT_HEADS, "PreTraining")


class ShrpElectraModel(ShrpElectraMixin, ShrpBaseMixin, ElectraModel):
    """The base encoder; converts plain checkpoints through `from_pretrained(..., expert_layers=n)`."""

    forward = routed(ElectraModel.forward)


class ShrpElectraHead(ShrpElectraMixin, ShrpHeadMixin):
    """What every task head declares."""

    base_model_class = ShrpElectraModel


class ShrpElectraForMaskedLM(ShrpElectraHead, ElectraForMaskedLM):
    """A masked language model."""

    forward = with_routing(ElectraForMaskedLM.forward, ShrpMaskedLMOutput)


class ShrpElectraForMultipleChoice(ShrpElectraHead, ElectraForMultipleChoice):
    """A scorer of several continuations."""

    forward = with_routing(ElectraForMultipleChoice.forward, ShrpMultipleChoiceOutput)


class ShrpElectraForPreTraining(ShrpElectraHead, ElectraForPreTraining):
    """The discriminator: which tokens were replaced?"""

    forward = with_routing(ElectraForPreTraining.forward, ShrpPreTrainingOutput)


class ShrpElectraForQuestionAnswering(ShrpElectraHead, ElectraForQuestionAnswering):
    """A span extractor."""

    forward = with_routing(ElectraForQuestionAnswering.forward, ShrpQuestionAnsweringOutput)


class ShrpElectraForSequenceClassification(ShrpElectraHead, ElectraForSequenceClassification):
    """A classifier or regressor of sequences."""

    forward = with_routing(ElectraForSequenceClassification.forward, ShrpSequenceClassifierOutput)


class ShrpElectraForTokenClassification(ShrpElectraHead, ElectraForTokenClassification):
    """A classifier of every token."""

    forward = with_routing(ElectraForTokenClassification.forward, ShrpTokenClassifierOutput)
