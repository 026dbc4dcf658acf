"""MPNet, every layer described by its heads and neurons."""

from typing import ClassVar

from huggingface_hub.dataclasses import strict
from transformers import MPNetConfig

from .configuration_shrp import ShrpConfigFields
from .layer_map import MPNET_LAYER_MAP, LayerMap


@strict
class ShrpMPNetConfig(ShrpConfigFields, MPNetConfig):
    """`MPNetConfig` with the fields of `ShrpConfigFields`; without them the model equals stock MPNet.

    All layers share one position bias, of which a layer takes the rows of its own heads.
    """

    model_type = "shrp_mpnet"
    stock_model_types: ClassVar[tuple[str, ...]] = ("mpnet",)
    layer_map: ClassVar[LayerMap] = MPNET_LAYER_MAP
