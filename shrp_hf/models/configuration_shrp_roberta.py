"""RoBERTa, XLM-R and CamemBERT, every layer described by its heads."""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, RobertaConfig

from .configuration_shrp import ShrpConfigFields


@strict
class ShrpRobertaConfig(ShrpConfigFields, RobertaConfig):
    """`RobertaConfig` with the fields of `ShrpConfigFields`; without them the model equals stock RoBERTa.

    `num_attention_heads` stays the original count, whatever was pruned. XLM-R and CamemBERT are RoBERTa too.

    Args:
        stock_model_type: Which of the three the checkpoint came from, and `to_stock` makes again.
    """

    model_type = "shrp_roberta"
    stock_model_types: ClassVar[tuple[str, ...]] = ("roberta", "xlm-roberta", "camembert")

    stock_model_type: str = "roberta"

    @classmethod
    def adopt(cls, fields: dict, source: str) -> dict[str, Any]:
        """As in `ShrpConfigFields`; what a config file leaves out means the default of its own family."""
        adopted = super().adopt(fields, source)
        found = fields.get("model_type", cls.model_type)
        if found == cls.model_type:
            return adopted
        defaults = {name: getattr(CONFIG_MAPPING[found], name) for name in RobertaConfig.__annotations__}
        return {**defaults, **adopted, "stock_model_type": found}
