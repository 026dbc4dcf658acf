"""The Shrp classes of a family that has no files here, made of its stock classes and its layer map."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig, PreTrainedModel

from .configuration_shrp import ShrpConfigFields
from .layer_map import LayerMap
from .modeling_shrp import ShrpBaseMixin, ShrpHeadMixin, ShrpModelMixin
from .slicing import SilentAttention


def build_config(stock: type[PreTrainedConfig], layer_map: LayerMap) -> Any:
    """Returns the Shrp config of a family: its own with the fields of `ShrpConfigFields`, and no expert layers.

    Raises:
        ValueError: The stock config sets its fields in an `__init__` of its own.
    """
    for each in stock.__mro__[: stock.__mro__.index(PreTrainedConfig)]:
        if "__init__" in vars(each) and not hasattr(vars(each)["__init__"], "__wrapped__"):
            raise ValueError(
                f"`{each.__name__}` has an `__init__` of its own, but a Shrp config is made of a config's fields: declare "
                "them as Transformers 5 does (`hidden_size: int = 768`), or give `config_class` a Shrp config of your own."
            )
    fields = {
        "__module__": stock.__module__,
        "__doc__": f"`{stock.__name__}` with the fields of `ShrpConfigFields`; built by `register_family`.",
        "model_type": f"shrp_{stock.model_type}",
        "stock_model_types": (stock.model_type,),
        "has_expert_layers": False,
        "layer_map": layer_map,
    }
    return strict(type(f"Shrp{stock.__name__}", (ShrpConfigFields, stock), fields))


def build_model(stock: type[PreTrainedModel], config_class: Any, base: type[PreTrainedModel] | None = None) -> Any:
    """Returns the Shrp class of a base model or, given the Shrp class of that, of a task head.

    Args:
        stock: The stock class.
        config_class: The Shrp config.
        base: The Shrp class of the base model, for a task head.
    """
    fields = {
        "__module__": stock.__module__,
        "__doc__": f"`{stock.__name__}` with kept heads and neurons; built by `register_family`.",
        "config_class": config_class,
        "has_code": False,
    }
    recorded = dict(getattr(stock, "_can_record_outputs", None) or {})
    if "attentions" in recorded:
        found = recorded["attentions"]
        recorded["attentions"] = [*(found if isinstance(found, list) else [found]), SilentAttention]
        fields["_can_record_outputs"] = recorded
    bases: tuple[type, ...] = (ShrpBaseMixin, stock)
    if base is not None:
        fields["base_model_class"] = base
        bases = (ShrpHeadMixin, stock)
    return type(f"Shrp{stock.__name__}", bases, fields)


def is_shrp(model_class: type) -> bool:
    """Whether a model class is a Shrp class already."""
    return issubclass(model_class, ShrpModelMixin)
