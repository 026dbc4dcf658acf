"""ViT, every layer described by its heads."""

from typing import ClassVar

from huggingface_hub.dataclasses import strict
from transformers import ViTConfig

from .configuration_shrp import ShrpConfigFields
from .layer_map import VIT_LAYER_MAP, LayerMap


@strict
class ShrpViTConfig(ShrpConfigFields, ViTConfig):
    """`ViTConfig` with the fields of `ShrpConfigFields`; without them the model equals stock ViT.

    `num_attention_heads` stays the original count, whatever was pruned.
    """

    model_type = "shrp_vit"
    stock_model_types: ClassVar[tuple[str, ...]] = ("vit",)
    layer_map: ClassVar[LayerMap] = VIT_LAYER_MAP

    @property
    def head_size(self) -> int:
        """Width of one head; a ViT whose heads no longer share out the hidden size says so in `head_dim`."""
        return getattr(self, "head_dim", None) or self.hidden_size // self.num_attention_heads
