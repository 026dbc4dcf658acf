"""ELECTRA with kept heads. Parameter names stay ELECTRA's."""

from collections.abc import Mapping
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
from transformers.models.electra.modeling_electra import ElectraLayer, ElectraSelfAttention

from .configuration_shrp_electra import ShrpElectraConfig
from .modeling_shrp import TEXT_HEADS, ShrpBaseMixin, ShrpHeadMixin, ShrpModelMixin, auto_map
from .slicing import SilentAttention


class ShrpElectraMixin(ShrpModelMixin):
    """What every Shrp ELECTRA class declares."""

    config: ShrpElectraConfig
    config_class = ShrpElectraConfig
    _can_record_outputs: ClassVar[dict] = {
        "hidden_states": ElectraLayer,
        "attentions": [ElectraSelfAttention, SilentAttention],
    }
    auto_classes: ClassVar[Mapping[str, str]] = auto_map("Electra", *TEXT_HEADS, "PreTraining")


class ShrpElectraModel(ShrpElectraMixin, ShrpBaseMixin, ElectraModel):
    """The base encoder."""


class ShrpElectraHead(ShrpElectraMixin, ShrpHeadMixin):
    """What every task head declares."""

    base_model_class = ShrpElectraModel


class ShrpElectraForMaskedLM(ShrpElectraHead, ElectraForMaskedLM):
    """A masked language model."""


class ShrpElectraForMultipleChoice(ShrpElectraHead, ElectraForMultipleChoice):
    """A scorer of several continuations."""


class ShrpElectraForPreTraining(ShrpElectraHead, ElectraForPreTraining):
    """The discriminator: which tokens were replaced?"""


class ShrpElectraForQuestionAnswering(ShrpElectraHead, ElectraForQuestionAnswering):
    """A span extractor."""


class ShrpElectraForSequenceClassification(ShrpElectraHead, ElectraForSequenceClassification):
    """A classifier or regressor of sequences."""


class ShrpElectraForTokenClassification(ShrpElectraHead, ElectraForTokenClassification):
    """A classifier of every token."""
