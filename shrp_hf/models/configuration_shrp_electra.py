"""ELECTRA, every layer described by its heads."""

from typing import ClassVar

from huggingface_hub.dataclasses import strict
from transformers import ElectraConfig

from .configuration_shrp import ShrpConfigFields


@strict
class ShrpElectraConfig(ShrpConfigFields, ElectraConfig):
    """`ElectraConfig` with the fields of `ShrpConfigFields`; without them the model equals stock ELECTRA.

    `num_attention_heads` stays the original count, whatever was pruned.
    """

    model_type = "shrp_electra"
    stock_model_types: ClassVar[tuple[str, ...]] = ("electra",)
