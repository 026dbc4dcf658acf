"""BERT, every layer described by its heads."""

from typing import ClassVar

from huggingface_hub.dataclasses import strict
from transformers import BertConfig

from .configuration_shrp import ShrpConfigFields


@strict
class ShrpBertConfig(ShrpConfigFields, BertConfig):
    """`BertConfig` with the fields of `ShrpConfigFields`; without them the model equals stock BERT.

    `num_attention_heads` stays the original count, whatever was pruned.
    """

    model_type = "shrp_bert"
    stock_model_types: ClassVar[tuple[str, ...]] = ("bert",)
