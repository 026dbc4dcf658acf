"""The fields that every Shrp config adds to its family's own."""

import difflib
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from .layer_map import BERT_LAYER_MAP, LayerMap

FORMAT_VERSION = 2
MAX_EXPERTS_PER_SEQUENCE = 5  # the paper compares Top-1, Top-3 and Top-5
# Far above what exists; a damaged file must not make a machine build layers, or claim memory, without end.
_SIZES = {"num_hidden_layers": 1000, "num_attention_heads": 10_000} | dict.fromkeys(
    ("hidden_size", "intermediate_size", "hidden_dim", "vocab_size", "max_position_embeddings", "type_vocab_size")
    + ("embedding_size", "image_size", "patch_size", "num_channels"),
    10**8,
)
_DTYPES = ("auto", "float16", "bfloat16", "float32", "float64")
_OUR_FIELDS = (
    "expert_layers",
    "pending_layers",
    "kept_heads",
    "intermediate_sizes",
    "output_bias",
    "routed",
    "experts_per_sequence",
    "router_pooling",
    "router_aux_loss_coef",
    "format_version",
)


@dataclass(kw_only=True)
class ShrpConfigFields:
    """Describes every layer: an ordinary layer with the heads that were kept, or an expert layer.

    Args:
        expert_layers: Indices of the layers that run as expert layers (SHRP).
        pending_layers: Layers that hold both their dense and their expert form while training; empty otherwise.
        kept_heads: Per layer the original indices of the heads (expert layer: experts) that are left; None: all.
        intermediate_sizes: Per layer the neurons of its FFN that are left (0: no FFN; an expert layer has none); None: all.
        output_bias: Whether W_O and the second FFN matrix have a bias where the stock class gives them none.
        routed: Whether expert layers choose their experts by a router (training) or run all they kept (static).
        experts_per_sequence: Top-k of the router, 1 to 5.
        router_pooling: What a router looks at: "mean" of the real tokens, or "cls", the first real token.
        router_aux_loss_coef: Weight of the balance loss in a routed model's training loss.
        format_version: The lowest version of the saved format that can say all this; set here, whatever is given.

    Raises:
        ValueError: The fields contradict each other or the family's own, or an unknown field closely resembles one.
    """

    stock_model_types: ClassVar[tuple[str, ...]] = ()
    has_expert_layers: ClassVar[bool] = True
    layer_map: ClassVar[LayerMap] = BERT_LAYER_MAP
    before_first: ClassVar[list[Callable[[], None]]] = []  # each called once, before a config of any family is made
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values", "router_logits", "task_loss", "balance_loss"]

    expert_layers: list[int] = field(default_factory=list)
    pending_layers: list[int] = field(default_factory=list)
    kept_heads: list[list[int]] | None = None
    intermediate_sizes: list[int] | None = None
    output_bias: bool = False
    routed: bool = True
    experts_per_sequence: int = 1
    router_pooling: str = "mean"
    router_aux_loss_coef: float | int = 0.1
    format_version: int = 1

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Also when it is unpickled: who holds a config may ask an Auto class for its model."""
        while cls.before_first:
            cls.before_first.pop()()
        return super().__new__(cls)

    def __post_init__(self, **kwargs: Any) -> None:
        """Takes over `pruned_heads` of Transformers 4, then checks everything."""
        for name in set(kwargs) - set(self.__dataclass_fields__) - {"intermediate_size"}:
            match = difflib.get_close_matches(name, _OUR_FIELDS, n=1, cutoff=0.8)
            if match:
                raise ValueError(f"Unknown config field `{name}`: did you mean `{match[0]}`?")
        removed = kwargs.pop("pruned_heads", None)
        super().__post_init__(**kwargs)
        if removed and self.kept_heads is None:
            self.kept_heads = self._kept_from_removed(removed)
        self.check_layers()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in Transformers; a newer format is refused first, because its fields may be of other types."""
        _check_version(config_dict.get("format_version", FORMAT_VERSION))
        _check_values(config_dict)
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> tuple[dict, dict]:
        """Reads a config of this class or of the stock family it extends, and refuses any other by name."""
        try:
            config, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        except (AttributeError, TypeError, RecursionError) as error:  # JSON, but no object, or one of endless depth
            raise _damaged(pretrained_model_name_or_path) from error
        if not isinstance(config, dict):
            raise _damaged(pretrained_model_name_or_path)
        return cls.adopt(config, str(pretrained_model_name_or_path)), kwargs

    def to_dict(self) -> dict[str, Any]:
        """As in Transformers; PEFT asks for it before it looks up where LoRA goes, so it is told here and never imported."""
        peft = sys.modules.get("peft.utils.constants")
        if peft is not None:
            targets = dict.fromkeys(self.layer_map.heads_in[index].path.rpartition(".")[2] for index in (0, 2))
            peft.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.setdefault(self.model_type, list(targets))
        return super().to_dict()

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As in Transformers; a config saved without its model names no code, for none lies beside it."""
        named = self.__dict__.pop("auto_map", None)
        try:
            super().save_pretrained(*args, **kwargs)
        finally:
            self.__dict__.pop("auto_map", None)
            if named is not None:
                self.auto_map = named

    @classmethod
    def adopt(cls, fields: dict, source: str) -> dict:
        """Returns the fields of a config of this class, or of a stock family that it extends, as fields of this class.

        Args:
            fields: What the file holds.
            source: Where they came from, for the error.

        Raises:
            ValueError: They are of another family.
        """
        found = fields.get("model_type", cls.model_type)
        if found not in (cls.model_type, *cls.stock_model_types):
            known = ", ".join(f"`{name}`" for name in (*cls.stock_model_types, cls.model_type))
            raise ValueError(
                f"`{source}` is a checkpoint of the family `{found}`, but {cls.__name__} reads {known}. Load it with "
                "the class of its own family."
            )
        return {**fields, "model_type": cls.model_type}

    def _kept_from_removed(self, removed: dict) -> list[list[int]]:
        try:
            gone = {int(layer): {int(head) for head in heads} for layer, heads in removed.items()}
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"`pruned_heads` must be an object {{layer: [heads]}}, got {removed!r}.") from error
        heads = range(self.num_attention_heads)
        for layer, indices in gone.items():
            if not 0 <= layer < self.num_hidden_layers or not indices <= set(heads):
                raise ValueError(
                    f"`pruned_heads` names heads {sorted(indices)} of layer {layer}, but the model has "
                    f"{self.num_hidden_layers} layers of {self.num_attention_heads} heads."
                )
        return [[head for head in heads if head not in gone.get(i, ())] for i in range(self.num_hidden_layers)]

    def heads_of(self, layer: int) -> list[int]:
        """Original indices of the heads (or experts) that `layer` has, in order."""
        return list(range(self.num_attention_heads)) if self.kept_heads is None else list(self.kept_heads[layer])

    def num_neurons_of(self, layer: int) -> int:
        """Neurons of the FFN of `layer`, none in an expert layer."""
        if layer in self.expert_layers and layer not in self.pending_layers:
            return 0
        return self.ffn_width if self.intermediate_sizes is None else self.intermediate_sizes[layer]

    def set_num_neurons_(self, counts: list[int]) -> None:
        """Takes over how many neurons each layer has; all in all layers becomes None.

        Args:
            counts: One per layer; what is said of expert layers does not count.
        """
        experts = set(self.expert_layers) - set(self.pending_layers)
        is_full = all(count == self.ffn_width for layer, count in enumerate(counts) if layer not in experts)
        counts = [0 if layer in experts else count for layer, count in enumerate(counts)]
        self.intermediate_sizes = None if is_full else counts

    @property
    def ffn_width(self) -> int:
        """Neurons of a whole FFN."""
        return getattr(self, self.layer_map.ffn_width)

    @property
    def head_size(self) -> int:
        """Width of one head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def is_dense(self) -> bool:
        """Whether all layers are those of the stock model."""
        changes = (self.kept_heads, self.intermediate_sizes, self.expert_layers, self.pending_layers)
        return not any(changes) and not self.output_bias

    @property
    def is_routed(self) -> bool:
        """Whether a router runs, or will once a pending layer is converted."""
        return self.routed and bool(self.expert_layers or self.pending_layers)

    def check_layers(self) -> None:
        """Refuses contradictory fields.

        Raises:
            ValueError: Names the field, its value and the way out.
        """
        _check_version(self.format_version)
        check_positions(self)
        self._check_sizes()
        weights = getattr(self, "transformers_weights", None)
        if weights is not None and not str(weights).endswith((".safetensors", ".safetensors.index.json")):
            raise ValueError(f"`transformers_weights={weights!r}` is no safetensors file: shrp_hf reads no other.")
        for name in ("is_decoder", "add_cross_attention"):
            if getattr(self, name, False):
                raise ValueError(f"`{name}=True` is not supported: shrp_hf makes encoders smaller. Set it to False.")
        if not 1 <= self.experts_per_sequence <= min(MAX_EXPERTS_PER_SEQUENCE, self.num_attention_heads):
            raise ValueError(
                f"`experts_per_sequence` must be between 1 and "
                f"{min(MAX_EXPERTS_PER_SEQUENCE, self.num_attention_heads)}, got {self.experts_per_sequence}."
            )
        if self.router_pooling not in ("mean", "cls"):
            raise ValueError(f'`router_pooling` must be "mean" or "cls", got {self.router_pooling!r}.')
        if not 0 <= self.router_aux_loss_coef < float("inf"):
            raise ValueError(f"`router_aux_loss_coef` must be 0 or more, got {self.router_aux_loss_coef}.")
        if not self.has_expert_layers and (self.expert_layers or self.pending_layers):
            raise ValueError(
                f"`expert_layers={self.expert_layers or self.pending_layers}`: `{self.model_type}` has none; a family that "
                "was registered from outside does not convert to SHRP. Leave the field empty, its heads can still be pruned."
            )
        self.expert_layers = self._checked_layers("expert_layers")
        self.pending_layers = self._checked_layers("pending_layers")
        if self.pending_layers and not self.routed:
            raise ValueError(
                f"`pending_layers={self.pending_layers}` contradicts `routed=False`: a layer that is being converted "
                "has a router. Finish the conversion, or set `pending_layers=[]`."
            )
        self._check_kept_heads()
        self._check_intermediate_sizes()
        self.format_version = 1 if self.intermediate_sizes is None and not self.output_bias else 2

    def _check_sizes(self) -> None:
        for name, most in _SIZES.items():
            size = getattr(self, name, None)
            least = int(name != "type_vocab_size")  # DeBERTa tells no types of tokens apart
            if isinstance(size, int) and not least <= size <= most:
                raise ValueError(f"`{name}` must be between {least} and {most:,}, got {size}.")
        padding = getattr(self, "pad_token_id", None)
        count = getattr(self, "vocab_size", None)
        if padding is not None and count is not None and not -count <= padding < count:
            raise ValueError(f"`pad_token_id` must be one of {count} tokens, from 0 to {count - 1}, got {padding}.")

    def _checked_layers(self, name: str) -> list[int]:
        layers = getattr(self, name)
        for layer in layers:
            if isinstance(layer, bool) or not 0 <= layer < self.num_hidden_layers:
                raise ValueError(
                    f"`{name}` names layer {layer}, but the model's layers are 0 to {self.num_hidden_layers - 1}."
                )
        if len(set(layers)) != len(layers):
            raise ValueError(f"`{name}` names a layer twice: {layers}.")
        return sorted(layers)

    def _check_kept_heads(self) -> None:
        if self.kept_heads is None:
            return
        if len(self.kept_heads) != self.num_hidden_layers:
            raise ValueError(
                f"`kept_heads` describes {len(self.kept_heads)} layers, but the model has {self.num_hidden_layers}."
            )
        count = self.num_attention_heads
        needs_all = set(self.pending_layers) | (set(self.expert_layers) if self.routed else set())
        for layer, heads in enumerate(self.kept_heads):
            if heads != sorted(set(heads)) or any(isinstance(h, bool) or not 0 <= h < count for h in heads):
                raise ValueError(
                    f"`kept_heads[{layer}]` must be ascending indices from 0 to {count - 1} without repetition, got {heads}."
                )
            if layer in needs_all and len(heads) != count:
                raise ValueError(
                    f"`kept_heads[{layer}]` keeps {len(heads)} of {count} experts, but layer {layer} is routed: a router "
                    "chooses among all. Set `routed=False`, or keep them all."
                )
            if layer in self.expert_layers and not heads:
                raise ValueError(f"`kept_heads[{layer}]` is empty, but expert layer {layer} needs at least one expert.")

    def _check_intermediate_sizes(self) -> None:
        sizes, width = self.intermediate_sizes, self.ffn_width
        if sizes is None:
            return
        if len(sizes) != self.num_hidden_layers:
            raise ValueError(
                f"`intermediate_sizes` describes {len(sizes)} layers, but the model has {self.num_hidden_layers}."
            )
        for layer, size in enumerate(sizes):
            if isinstance(size, bool) or not 0 <= size <= width:
                raise ValueError(
                    f"`intermediate_sizes[{layer}]` must be from 0 to {width} (`{self.layer_map.ffn_width}`), got {size}."
                )
            if size and layer in self.expert_layers and layer not in self.pending_layers:
                raise ValueError(
                    f"`intermediate_sizes[{layer}]` is {size}, but layer {layer} is an expert layer, which has no FFN: set it "
                    "to 0."
                )


def check_positions(config: Any) -> None:
    """Refuses relative positions, which Transformers 5 reads in a config and then computes without.

    Args:
        config: A stock or Shrp config.

    Raises:
        ValueError: It asks for them.
    """
    kind = getattr(config, "position_embedding_type", None)
    if kind not in (None, "absolute"):
        raise ValueError(
            f"`position_embedding_type={kind!r}` is not supported: Transformers 5 computes with absolute positions all the "
            "same, so nothing would be as it was trained. Train a model with absolute positions, or stay with transformers 4."
        )


def _check_version(version: Any) -> None:
    if not isinstance(version, int):
        raise ValueError(f"`format_version` must be a whole number, got {version!r}.")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"`format_version` is {version}, but this code reads versions up to {FORMAT_VERSION}: install a newer shrp_hf."
        )
    if version < 1:
        raise ValueError(f"`format_version` must be at least 1, got {version}.")


def _check_values(fields: dict[str, Any]) -> None:
    """Refuses what Transformers would look up in torch, or take apart, unchecked."""
    from transformers.activations import ACT2FN  # brings torch.distributed and sympy, most of the time of `import shrp_hf`

    for name in ("dtype", "torch_dtype"):
        dtype = fields.get(name)
        if dtype is not None and str(dtype).removeprefix("torch.") not in _DTYPES:
            raise ValueError(f"`{name}` must be one of {', '.join(_DTYPES)}, got {dtype!r}.")
    for name in ("hidden_act", "activation"):
        activation = fields.get(name)
        known = callable(activation) or (isinstance(activation, str) and activation in ACT2FN)
        if activation is not None and not known:
            raise ValueError(f"`{name}` must be an activation that Transformers knows, such as 'gelu', got {activation!r}.")
    quantization = fields.get("quantization_config")
    if isinstance(quantization, str | int | float | list):
        raise ValueError(f"`quantization_config` must be an object, got {quantization!r}.")


def _damaged(source: Any) -> ValueError:
    return ValueError(f"`config.json` of `{source}` is damaged, it holds no JSON object: download or save it again.")
