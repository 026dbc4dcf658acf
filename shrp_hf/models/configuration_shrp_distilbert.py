"""DistilBERT, every layer described by its heads."""

from typing import ClassVar

from huggingface_hub.dataclasses import strict
from transformers import DistilBertConfig

from .configuration_shrp import ShrpConfigFields
from .layer_map import DISTILBERT_LAYER_MAP, LayerMap


@strict
class ShrpDistilBertConfig(ShrpConfigFields, DistilBertConfig):
    """`DistilBertConfig` with the fields of `ShrpConfigFields`; without them the model equals stock DistilBERT.

    `n_heads` stays the original count, whatever was pruned.
    """

    model_type = "shrp_distilbert"
    stock_model_types: ClassVar[tuple[str, ...]] = ("distilbert",)
    layer_map: ClassVar[LayerMap] = DISTILBERT_LAYER_MAP
