"""ViT with expert layers and kept heads. Parameter names stay ViT's."""

from collections.abc import Mapping
from typing import ClassVar

from transformers import (
    ViTForImageClassification,
    ViTModel,
)
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.vit.modeling_vit import ViTAttention, ViTLayer

from .configuration_shrp_vit import ShrpViTConfig
from .expert_attention import ExpertAttention
from .expert_layer import ExpertLayer
from .modeling_shrp import ShrpBaseMixin, ShrpHeadMixin, ShrpModelMixin, auto_map
from .routing import (
    ShrpImageClassifierOutput,
    routed,
    with_routing,
)
from .slicing import SilentAttention

# ViT checkpoints keep their old parameter names on disk; Transformers looks up the new ones by the name of the class.
register_checkpoint_conversion_mapping("ShrpViTModel", get_checkpoint_conversion_mapping("ViTModel"), overwrite=True)


class ShrpViTMixin(ShrpModelMixin):
    """What every Shrp ViT class declares."""

    config: ShrpViTConfig
    config_class = ShrpViTConfig
    _can_record_outputs: ClassVar[dict] = {
        "hidden_states": [ViTLayer, ExpertLayer],
        "attentions": [ViTAttention, ExpertAttention, SilentAttention],
    }
    auto_classes: ClassVar[Mapping[str, str]] = auto_map("ViT", "ImageClassification")


class ShrpViTModel(ShrpViTMixin, ShrpBaseMixin, ViTModel):
    """The base encoder; converts plain checkpoints through `from_pretrained(..., expert_layers=n)`."""

    forward = routed(ViTModel.forward)


class ShrpViTHead(ShrpViTMixin, ShrpHeadMixin):
    """What every task head declares."""

    base_model_class = ShrpViTModel


class ShrpViTForImageClassification(ShrpViTHead, ViTForImageClassification):
    """A classifier of images."""

    forward = with_routing(ViTForImageClassification.forward, ShrpImageClassifierOutput)
