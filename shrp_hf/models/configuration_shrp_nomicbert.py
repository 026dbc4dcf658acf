"""NomicBERT, every layer described by its heads and neurons."""

from typing import ClassVar

from huggingface_hub.dataclasses import strict
from transformers import NomicBertConfig

from .configuration_shrp import ShrpConfigFields
from .layer_map import NOMIC_BERT_LAYER_MAP, LayerMap


@strict
class ShrpNomicBertConfig(ShrpConfigFields, NomicBertConfig):
    """`NomicBertConfig` with the fields of `ShrpConfigFields`; without them the model equals stock NomicBERT."""

    model_type = "shrp_nomic_bert"
    stock_model_types: ClassVar[tuple[str, ...]] = ("nomic_bert",)
    layer_map: ClassVar[LayerMap] = NOMIC_BERT_LAYER_MAP

    @property
    def head_size(self) -> int:
        """Width of one head."""
        return self.head_dim
