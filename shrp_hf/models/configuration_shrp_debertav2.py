"""DeBERTa-v2 and v3, every layer described by its heads and neurons."""

from typing import ClassVar

from huggingface_hub.dataclasses import strict
from transformers import DebertaV2Config

from .configuration_shrp import ShrpConfigFields
from .layer_map import DEBERTA_V2_LAYER_MAP, LayerMap


@strict
class ShrpDebertaV2Config(ShrpConfigFields, DebertaV2Config):
    """`DebertaV2Config` with the fields of `ShrpConfigFields`; without them the model equals stock DeBERTa-v2 or v3.

    Where position projections are a layer's own (v2), they are cut with its heads; v3 shares those of query and key.
    """

    model_type = "shrp_deberta_v2"
    stock_model_types: ClassVar[tuple[str, ...]] = ("deberta-v2",)
    layer_map: ClassVar[LayerMap] = DEBERTA_V2_LAYER_MAP
