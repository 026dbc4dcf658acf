"""What the Shrp models of all families share: building from the config, converting, pruning and loading."""

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init

from .expert_layer import EXPANDER_GAIN, Expander, ExpertLayer, Router
from .pruning import PrunedLayersMixin
from .rebuilding import check_as_built, check_plain, pooler_options, take_weights_
from .safe_weights import SafeWeightsMixin
from .saving import SavingMixin
from .slicing import BiasOnly, FirstColumns

TEXT_HEADS = ("MaskedLM", "MultipleChoice", "QuestionAnswering", "SequenceClassification", "TokenClassification")


class ShrpModelMixin(PrunedLayersMixin, SavingMixin, SafeWeightsMixin):
    """Methods of every Shrp model, with or without a task head. Mixed in before the stock class."""

    _no_split_modules: Any
    # The stock heads take `**kwargs` but ignore `num_items_in_batch`: without this, Trainer inflates the gradients.
    accepts_loss_kwargs = False

    def post_init(self) -> None:
        """As in Transformers; then lists the layer classes that are really there, which FSDP insists on."""
        super().post_init()
        self._list_layer_classes_()

    def _list_layer_classes_(self) -> None:
        present = {type(module).__name__ for module in self.modules()}
        known = set(type(self)._no_split_modules or ()) | set(self._no_split_modules or ()) | {"ExpertLayer"}
        self._no_split_modules = known & (present | {name for name in known if name.endswith("Embeddings")})

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if not any(isinstance(child, FirstColumns | BiasOnly) for child in module.children()):
            super()._init_weights(module)  # which some families do through the weights of a module's children
        if isinstance(module, Router):
            module.reset_parameters(self.config.initializer_range)
        elif isinstance(module, Expander):
            init.constant_(module.LayerNorm.weight, EXPANDER_GAIN)

    # --- SHRP: conversion ---

    def convert_layers_(self, layers: int | Sequence[int], pending: bool = False) -> None:
        """Turns dense layers into expert layers, warm-started from their weights, with untrained routers.

        Args:
            layers: Indices of the layers, or a number n: the last n.
            pending: Keep the dense halves, and run as those until `activate_layer_`.

        Raises:
            ValueError: A layer is out of range, already an expert layer, or has lost heads; the family has no expert
                layers; a projection is wrapped; or the weights are spread over several devices.
        """
        layers = self._layers_to_convert(layers)
        check_plain({i: self.layers[i] for i in layers}, self.config.layer_map)
        for i in layers:
            if not pending:
                self.config.expert_layers = sorted([*self.config.expert_layers, i])
            # Both halves first: the warm start reads W_O.
            self.config.pending_layers = sorted([*self.config.pending_layers, i])
            dense = self.layers[i]
            self.layers[i] = ExpertLayer(self.config, i, dense)
            self.layers[i].expander.warm_start_(self.layers[i].get_submodule(self.config.layer_map.heads_out).weight)
            if not pending:
                self.config.pending_layers.remove(i)
                self.layers[i].drop_dense_half_()
        self.config.routed = True
        self._refresh_()

    def _layers_to_convert(self, layers: int | Sequence[int]) -> list[int]:
        total = self.config.num_hidden_layers
        if not self.config.has_expert_layers:
            raise ValueError(
                f"`{type(self).__name__}` has no expert layers: a family that was registered from outside does not convert to "
                "SHRP. Cut its heads and neurons instead (`prune_heads`)."
            )
        layers = _layer_indices(layers, total)
        if self.config.kept_heads is not None or (self.config.expert_layers and not self.config.routed):
            raise ValueError(
                f"`expert_layers={layers}` cannot be converted: this model is already pruned, and a warm start needs all "
                "heads. Convert the unpruned checkpoint."
            )
        done = sorted(set(layers) & {*self.config.expert_layers, *self.config.pending_layers})
        if done:
            raise ValueError(f"`expert_layers` names {done}, which are expert layers already: leave them out.")
        if len(set(getattr(self, "hf_device_map", {}).values())) > 1:
            raise ValueError(
                "`device_map` spreads the model over several devices: convert on one, save, and load the result with it."
            )
        return sorted(layers)

    def activate_layer_(self, layer: int, warm_start: bool = True) -> None:
        """Lets a pending layer run as an expert layer from now on, warm-started from its dense half as it is now.

        Args:
            layer: Its index.
            warm_start: False keeps the expert half's own weights, for example those of a checkpoint.

        Raises:
            ValueError: The layer is not pending.
        """
        if layer not in self.config.pending_layers:
            raise ValueError(f"Layer {layer} is not pending; pending are {self.config.pending_layers}.")
        if warm_start:
            self.layers[layer].warm_start_()
        self.layers[layer].active = True
        self.config.expert_layers = sorted({*self.config.expert_layers, layer})

    def finish_conversion_(self) -> None:
        """Drops the dense halves of the layers that were pending, all of which must run as expert layers by now.

        Raises:
            ValueError: A layer was not activated.
        """
        for i in self.config.pending_layers:
            if not self.layers[i].active:
                raise ValueError(f"Layer {i} is still to be converted: call `activate_layer_({i})`, or train to the end.")
        for i in self.config.pending_layers:
            self.layers[i].drop_dense_half_()
        self.config.pending_layers = []
        self._refresh_()

    def usage(self) -> dict[int, list[int]]:
        """Sequences routed to each expert so far in training: layer index -> one count per expert."""
        routed = {i: layer.router for i, layer in enumerate(self.layers) if getattr(layer, "router", None) is not None}
        return {i: router.usage.tolist() for i, router in routed.items()}

    def reset_usage_(self) -> None:
        """Forgets the counts."""
        for layer in self.layers:
            if getattr(layer, "router", None) is not None:
                layer.router.usage.zero_()

    # --- loading ---

    @classmethod
    def from_stock(cls, model: PreTrainedModel) -> Self:
        """Wraps a stock model of this family; the weights are shared, not copied.

        Raises:
            ValueError: The model is of another family, or not what its class and config build (`check_as_built`).
        """
        found = model.config.model_type
        if found not in cls.config_class.stock_model_types:
            raise ValueError(f"`{type(model).__name__}` is of the family `{found}`, which {cls.__name__} does not extend.")
        check_as_built(model, extended=cls)
        fields = cls.config_class.adopt(model.config.to_dict(), type(model).__name__)
        # Transformers 5 ignores this field: the weights of a stock model are whole.
        config = cls.config_class.from_dict({**fields, "pruned_heads": None})
        config._attn_implementation = model.config._attn_implementation
        with init.no_init_weights():
            wrapped = cls(config, **pooler_options(model, type(model)))
        take_weights_(wrapped, model, model.state_dict(keep_vars=True))
        return wrapped.train(model.training)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *model_args: Any,
        expert_layers: int | Sequence[int] | None = None,
        **kwargs: Any,
    ) -> Self:
        """Loads a Shrp checkpoint, or a plain one of the family, and converts it when asked to.

        Args:
            pretrained_model_name_or_path: Hub id or directory.
            *model_args: As in Transformers.
            expert_layers: Layers to convert on loading (routed, with untrained routers): a number n for the last n, or a
                list of indices. None loads the model as it is.
            **kwargs: As in Transformers (`dtype`, `attn_implementation`, `device_map`, `revision`, ...).

        Raises:
            ValueError: Encoder weights of a Shrp checkpoint are missing, unexpected or misshapen; a file is damaged, or no
                safetensors; the checkpoint is of another family; or `expert_layers` does not fit it.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        config = kwargs.get("config")
        if config is not None and not isinstance(config, cls.config_class) and hasattr(config, "to_dict"):
            fields = cls.config_class.adopt(config.to_dict(), type(config).__name__)
            kwargs["config"] = cls.config_class.from_dict(fields)
        try:
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, *model_args, output_loading_info=True, **kwargs
            )
        except Exception as error:
            if type(error).__name__ != "SafetensorError":
                raise
            raise ValueError(
                f"The weights of `{pretrained_model_name_or_path}` are damaged ({error}): download or save them again."
            ) from error
        if expert_layers is not None:
            model.convert_layers_(expert_layers)
        loaded: Any = (model, info) if wants_info else model  # the pair only for those who ask, as in Transformers
        return loaded

    @staticmethod
    def _finalize_model_loading(model: Any, load_config: Any, loading_info: Any) -> Any:
        """As in Transformers, which draws weights that are missing or misshapen anew; never those of our encoders."""
        model._check_encoder_weights(load_config, loading_info)
        return PreTrainedModel._finalize_model_loading(model, load_config, loading_info)

    def _check_encoder_weights(self, load_config: Any, info: Any) -> None:
        config, prefix = self.config, f"{self.base_model_prefix}."
        own = {name for name in self.base_model.state_dict() if not name.startswith("pooler.")}
        problems = {"missing": info.missing_keys, "unexpected": info.unexpected_keys, "mismatched": info.mismatched_keys}
        if config.is_dense:
            # A dense model may be asked for fewer layers than its files have, or to draw misshapen weights anew.
            problems["unexpected"] = ()
            problems["mismatched"] = () if load_config.ignore_mismatched_sizes else info.mismatched_keys
        for problem, keys in problems.items():
            names = sorted(
                name
                for name in (key if isinstance(key, str) else key[0] for key in keys)
                # Old files carry buffers of the embeddings that nobody expects any more: those are no damage.
                if (f"{self.config.layer_map.layers}." in name and not self._is_left_empty(name))
                or name.removeprefix(prefix) in own
            )
            if names:
                raise ValueError(
                    f"`{load_config.pretrained_model_name_or_path}` does not fit its config: {len(names)} encoder weights are "
                    f"{problem}, the first is `{names[0]}`{self._said_of(names[0])}. The files are damaged or were mixed: "
                    "download or save them again."
                )

    def _is_left_empty(self, name: str) -> bool:
        """Whether a weight belongs to the attention of a layer without heads; Transformers 4 saved it, with no rows."""
        layer, path = self._place_of(name)
        silent = {str(i) for i in range(self.config.num_hidden_layers) if not self.config.heads_of(i)}
        return layer in silent and path in self.config.layer_map.head_paths

    def _said_of(self, name: str) -> str:
        """What the config says about the neurons of a weight, if it has any."""
        layer, path = self._place_of(name)
        if self.config.intermediate_sizes is None or path not in self.config.layer_map.neuron_paths:
            return ""
        return f" (`intermediate_sizes[{layer}]` is {self.config.intermediate_sizes[int(layer)]})"

    def _place_of(self, name: str) -> tuple[str, str]:
        """Index of the layer, and path of the module within it, of a weight."""
        layer, _, path = name.partition(f"{self.config.layer_map.layers}.")[2].partition(".")
        return layer, path.rpartition(".")[0]


class ShrpBaseMixin(ShrpModelMixin):
    """A stock base model whose layers lose the heads that the config leaves out. Mixed in before the stock class."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self._build_layers_()
        self.post_init()


class ShrpHeadMixin(ShrpModelMixin):
    """A stock task head around a Shrp base model. Mixed in before the stock class."""

    base_model_class: ClassVar[type[PreTrainedModel]]

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        stock = getattr(self, self.base_model_prefix)
        base = self.base_model_class(config, **pooler_options(stock, type(stock)))
        setattr(self, self.base_model_prefix, base)
        self.post_init()


def auto_map(family: str, *heads: str) -> dict[str, str]:
    """Names the Shrp class of every Auto class: `auto_map("Bert", "MaskedLM")` -> `{"AutoConfig": ..., ...}`."""
    config, model = (f"{kind}_shrp_{family.lower()}.Shrp{family}" for kind in ("configuration", "modeling"))
    classes = {f"AutoModelFor{head}": f"{model}For{head}" for head in heads}
    return {"AutoConfig": f"{config}Config", "AutoModel": f"{model}Model"} | classes


def _layer_indices(layers: int | Sequence[int], total: int) -> list[int]:
    """Spells out `expert_layers`: a number n is the last n of `total` layers."""
    if isinstance(layers, int):
        if isinstance(layers, bool) or not 1 <= layers <= total:
            raise ValueError(f"`expert_layers` must be between 1 and {total} layers, got {layers}.")
        layers = range(total - layers, total)
    is_listed = isinstance(layers, Iterable) and not isinstance(layers, Mapping | str)
    indices = list(layers) if is_listed else []
    if not is_listed or any(isinstance(i, bool) or not isinstance(i, int) for i in indices):
        raise ValueError(f"`expert_layers` must be a number of layers or a list of their indices, got {layers!r}.")
    for i in indices:
        if not 0 <= i < total:
            raise ValueError(f"`expert_layers` names layer {i}, but the model's layers are 0 to {total - 1}.")
    if not layers or len(set(layers)) != len(layers):
        raise ValueError(f"`expert_layers` must name at least one layer, and none twice, got {layers}.")
    return list(layers)
