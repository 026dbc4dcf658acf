"""The Shrp classes of a family that has no files here, made of its stock classes and its layer map."""

import os
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig, PreTrainedModel

from .configuration_shrp import ShrpConfigFields
from .layer_map import LayerMap
from .modeling_shrp import ShrpBaseMixin, ShrpHeadMixin, ShrpModelMixin
from .slicing import SilentAttention


class BuiltMixin:
    """What is different in a class that is in no file: its code cannot be shipped."""

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, with_code: bool = False, **kwargs: Any) -> None:
        """As in `ShrpModelMixin`, without code.

        Args:
            save_directory: Where to.
            *args: As in Transformers.
            with_code: True is refused.
            **kwargs: As in Transformers.

        Raises:
            ValueError: Code is asked for.
        """
        self._check_no_code(with_code)
        super().save_pretrained(save_directory, *args, with_code=False, **kwargs)

    def push_to_hub(self, repo_id: str, *args: Any, with_code: bool = False, **kwargs: Any) -> str:
        """As in `ShrpModelMixin`, without code.

        Args:
            repo_id: The repository.
            *args: As in Transformers.
            with_code: True is refused.
            **kwargs: As in Transformers.

        Raises:
            ValueError: Code is asked for.
        """
        self._check_no_code(with_code)
        return super().push_to_hub(repo_id, *args, with_code=False, **kwargs)

    def _check_no_code(self, with_code: bool) -> None:
        if with_code:
            raise ValueError(
                f"`with_code=True` needs a modeling file, but `{type(self).__name__}` was built by `register_family`: save "
                "without code, and call `register_family` where it is loaded; or write the class in a file, and give it in "
                "`model_classes`."
            )


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
    }
    recorded = dict(getattr(stock, "_can_record_outputs", None) or {})
    if "attentions" in recorded:
        found = recorded["attentions"]
        recorded["attentions"] = [*(found if isinstance(found, list) else [found]), SilentAttention]
        fields["_can_record_outputs"] = recorded
    if base is not None:
        fields["base_model_class"] = base
    return type(f"Shrp{stock.__name__}", (BuiltMixin, ShrpBaseMixin if base is None else ShrpHeadMixin, stock), fields)


def is_shrp(model_class: type) -> bool:
    """Whether a model class is a Shrp class already."""
    return issubclass(model_class, ShrpModelMixin)
