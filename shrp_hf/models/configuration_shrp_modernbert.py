"""ModernBERT, every layer described by its heads and neurons."""

from typing import ClassVar

from huggingface_hub.dataclasses import strict
from transformers import ModernBertConfig

from .configuration_shrp import ShrpConfigFields
from .layer_map import MODERNBERT_LAYER_MAP, LayerMap


@strict
class ShrpModernBertConfig(ShrpConfigFields, ModernBertConfig):
    """`ModernBertConfig` with the fields of `ShrpConfigFields`; without them the model equals stock ModernBERT."""

    model_type = "shrp_modernbert"
    stock_model_types: ClassVar[tuple[str, ...]] = ("modernbert",)
    layer_map: ClassVar[LayerMap] = MODERNBERT_LAYER_MAP
