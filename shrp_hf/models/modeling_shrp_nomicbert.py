"""NomicBERT with expert layers, kept heads and neurons. Parameter names stay the stock ones."""

from collections.abc import Mapping
from typing import ClassVar

from transformers import (
    NomicBertForMaskedLM,
    NomicBertForSequenceClassification,
    NomicBertForTokenClassification,
    NomicBertModel,
)
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.nomic_bert.modeling_nomic_bert import NomicBertAttention, NomicBertLayer

from .configuration_shrp_nomicbert import ShrpNomicBertConfig
from .expert_attention import ExpertAttention
from .expert_layer import ExpertLayer
from .modeling_shrp import ShrpBaseMixin, ShrpHeadMixin, ShrpModelMixin, auto_map
from .routing import (
    ShrpMaskedLMOutput,
    ShrpSequenceClassifierOutput,
    ShrpTokenClassifierOutput,
    routed,
    with_routing,
)
from .slicing import SilentAttention

# NomicBERT checkpoints keep their old parameter names on disk; Transformers looks up the new ones by the type of the model.
register_checkpoint_conversion_mapping(
    ShrpNomicBertConfig.model_type, get_checkpoint_conversion_mapping("nomic_bert"), overwrite=True
)

HEADS = ("MaskedLM", "SequenceClassification", "TokenClassification")


class ShrpNomicBertMixin(ShrpModelMixin):
    """What every Shrp NomicBERT class declares."""

    config: ShrpNomicBertConfig
    config_class = ShrpNomicBertConfig
    _can_record_outputs: ClassVar[dict] = {
        "hidden_states": [NomicBertLayer, ExpertLayer],
        "attentions": [NomicBertAttention, ExpertAttention, SilentAttention],
    }
    auto_classes: ClassVar[Mapping[str, str]] = auto_map("NomicBert", *HEADS)


class ShrpNomicBertModel(ShrpNomicBertMixin, ShrpBaseMixin, NomicBertModel):
    """The base encoder; converts plain checkpoints through `from_pretrained(..., expert_layers=n)`."""

    forward = routed(NomicBertModel.forward)


class ShrpNomicBertHead(ShrpNomicBertMixin, ShrpHeadMixin):
    """What every task head declares."""

    base_model_class = ShrpNomicBertModel


class ShrpNomicBertForMaskedLM(ShrpNomicBertHead, NomicBertForMaskedLM):
    """A masked language model."""

    forward = with_routing(NomicBertForMaskedLM.forward, ShrpMaskedLMOutput)


class ShrpNomicBertForSequenceClassification(ShrpNomicBertHead, NomicBertForSequenceClassification):
    """A classifier or regressor of sequences."""

    forward = with_routing(NomicBertForSequenceClassification.forward, ShrpSequenceClassifierOutput)


class ShrpNomicBertForTokenClassification(ShrpNomicBertHead, NomicBertForTokenClassification):
    """A classifier of every token."""

    forward = with_routing(NomicBertForTokenClassification.forward, ShrpTokenClassifierOutput)
