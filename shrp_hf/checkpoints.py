"""The door through which commands open models and tokenizers: what would not compute as its files say is refused by name."""

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from shrp_hf.families import FAMILIES
from shrp_hf.models.configuration_shrp import check_positions
from shrp_hf.models.safe_weights import load_safely

logger = logging.getLogger(__name__)

HALVES = {torch.float16, torch.bfloat16}
# What a model is called by what wraps it: DistributedDataParallel, torch.compile, FSDP, Lightning, sentence-transformers.
_WRAPPED = re.compile(r"((?:module|_orig_mod|_fsdp_wrapped_module|model|auto_model)\.)+")
_FAMILIES = {"bert", "roberta", "electra", "distilbert", "vit", "deberta", "mpnet"}  # what their weights begin with
_HINTS = {
    r"lora_|\.base_layer\.|\.adapters?\.": "An adapter was saved in place: merge it (PEFT: `merge_and_unload()`), save then.",
    r"_(orig|mask)$": "Masks of torch were saved: `torch.nn.utils.prune.remove(module, 'weight')` first, save then.",
    r"parametrizations\.|weight_[gv]$": "Parametrized weights were saved: `remove_parametrizations` (`remove_weight_norm`) "
    "first, save then.",
    r"absmax|quant|scales$|qweight|packed": "A quantised model was saved: take the one that it was made from.",
}


def warn_of_half_precision(model: torch.nn.Module) -> None:
    """Logs that a model which is about to be trained holds half precision, in which small steps of the optimizer are lost."""
    if half := _halves_of(model):
        logger.warning(
            "The weights are %s, as their file was: steps of the optimizer that are too small for it are lost, and quality "
            "falls. Load the model with `dtype=torch.float32`, and train with `bf16=True` for speed.",
            " and ".join(half),
        )


def open_config(name: str, **fields: Any) -> PreTrainedConfig:
    """Opens the config of a model; a Shrp config where Transformers 4 pruned a stock one.

    Args:
        name: Hub id or directory.
        **fields: Fields to change.

    Raises:
        ValueError: It asks for what Transformers 5 ignores, or for code of its own; or the model is an adapter or quantised.
    """
    if _file_of(name, "adapter_config.json") is not None:
        raise ValueError(
            f"`{name}` is an adapter (PEFT), no whole model: merge it, by `PeftModel.from_pretrained(base, {name!r})"
            ".merge_and_unload().save_pretrained(folder)`, and give that folder."
        )
    config = AutoConfig.from_pretrained(name, **fields)
    check_positions(config)
    _check_kind(config, name)
    if not getattr(config, "pruned_heads", None) or config.model_type not in FAMILIES:
        return config
    family = "roberta" if config.model_type in ("xlm-roberta", "camembert") else config.model_type
    if family.startswith("shrp_"):
        return config
    return type(AutoConfig.for_model(f"shrp_{family}")).from_pretrained(name, **fields)


def open_model(name: str, auto: Any = AutoModel, **fields: Any) -> tuple[PreTrainedModel, list[str]]:
    """Opens a stock or Shrp model with exactly the encoder weights of its files.

    A prefix that a wrapper left in all names of weights is read past, and a model that Transformers 4 pruned is opened by its
    Shrp class. Half precision is opened in float32, for scores and training. Each is logged.

    Args:
        name: Hub id or directory.
        auto: The Auto class of the task.
        **fields: Fields of the config to change, such as `num_labels`; a head that does not fit them is drawn anew.

    Returns:
        The model, in evaluation mode, and the names of the weights of its head (and pooler) that no file holds: they
        were drawn at random.

    Raises:
        ValueError: Encoder weights are missing, misshapen or left over; the config asks for what Transformers 5 ignores, or
            for code of its own; it is an adapter or quantised; or the weights are no safetensors.
    """
    config = open_config(name, **fields)
    if getattr(config, "kept_heads", None) and not AutoConfig.from_pretrained(name).model_type.startswith("shrp_"):
        logger.warning("`%s` was pruned by Transformers 4, which version 5 cannot open: its Shrp class does.", name)
    prefix = _wrapped_prefix(name)
    renamed = {"key_mapping": {f"^{re.escape(prefix)}": ""}} if prefix else {}
    if prefix:
        logger.warning("All weights of `%s` begin with `%s`, as a wrapper saved them: read without it.", name, prefix)
    with _without_load_report():
        model, info = load_safely(
            auto.from_pretrained, name, config=config, output_loading_info=True, ignore_mismatched_sizes=True, **renamed
        )
    misshapen = {key[0]: f"{tuple(key[1])} instead of {tuple(key[2])}" for key in info["mismatched_keys"]}
    own = _encoder_names(model)
    _check_encoder(model, name, info, misshapen, own)
    untrained = sorted({*info["missing_keys"], *misshapen} - own)
    if half := _halves_of(model):
        logger.warning(
            "`%s` is saved in %s: it is opened in float32, and so is what is made of it. For a file of half the size: "
            "`model.to(torch.%s).save_pretrained(...)`.",
            name,
            " and ".join(half),
            half[0],
        )
        model = model.float()
    return model.eval(), untrained


@contextmanager
def _without_load_report() -> Iterator[None]:
    """Keeps Transformers' table of missing and misshapen weights off the terminal: what it says is said here in a line."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def open_tokenizer(name: str, model: PreTrainedModel) -> PreTrainedTokenizerBase:
    """Opens the tokenizer of a model; it pads on the right, and knows how many positions the model has.

    Args:
        name: Hub id or directory.
        model: The model that it feeds.

    Raises:
        ValueError: There is none (Transformers makes one without words up), it has more tokens than the model, or none to
            pad with.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`{name}` holds no tokenizer that loads: save the model's own into it by `save_pretrained`."
        ) from error
    tokens = tokenizer.get_vocab()
    if len(tokens) <= len(tokenizer.all_special_tokens):
        raise ValueError(
            f"`{name}` holds no tokenizer: Transformers makes one up, which knows no words. Save the model's own into it by "
            "`save_pretrained`."
        )
    rows = model.get_input_embeddings().weight.shape[0]
    if max(tokens.values()) >= rows:
        raise ValueError(
            f"The tokenizer in `{name}` has {max(tokens.values()) + 1} tokens, but the model embeds {rows}: it is that of "
            "another model, or tokens were added without `model.resize_token_embeddings(len(tokenizer))`."
        )
    if tokenizer.pad_token_id is None:
        raise ValueError(f"The tokenizer in `{name}` has no `pad_token`: set it to the one the model was trained with.")
    embeddings = getattr(model.base_model, "embeddings", None)
    padding = getattr(getattr(embeddings, "position_embeddings", None), "padding_idx", None)
    if padding is not None and padding != tokenizer.pad_token_id:
        raise ValueError(
            f"The tokenizer in `{name}` pads with token {tokenizer.pad_token_id}, but the model counts positions by its own "
            f"`pad_token_id={padding}`: give the model its own tokenizer."
        )
    if tokenizer.padding_side != "right":
        logger.warning("The tokenizer of `%s` pads on the left, which shifts positions: it pads on the right here.", name)
        tokenizer.padding_side = "right"
    positions = getattr(model.config, "max_position_embeddings", tokenizer.model_max_length)
    tokenizer.model_max_length = min(tokenizer.model_max_length, positions - (0 if padding is None else padding + 1))
    return tokenizer


def _halves_of(model: torch.nn.Module) -> list[str]:
    """Names the half precisions among the trainable weights."""
    found = {parameter.dtype for parameter in model.parameters() if parameter.requires_grad}
    return sorted(str(dtype).removeprefix("torch.") for dtype in found & HALVES)


def _file_of(name: str, file: str) -> str | None:
    """Returns the path of a file of a model, None where there is none."""
    quiet = {f"_raise_exceptions_for_{kind}": False for kind in ("missing_entries", "gated_repo", "connection_errors")}
    return cached_file(name, file, **quiet)


def _check_kind(config: PreTrainedConfig, name: str) -> None:
    """Refuses a quantised model, and one with code of its own: Transformers would open it by the stock class."""
    if getattr(config, "quantization_config", None):
        raise ValueError(
            f"`{name}` is quantised (`quantization_config`): take the model that it was made from, quantise last."
        )
    classes = {kind: path for kind, path in (getattr(config, "auto_map", None) or {}).items() if kind.startswith("AutoModel")}
    foreign = [str(path) for path in classes.values() if not str(path).rpartition(".")[2].startswith("Shrp")]
    if foreign:
        raise ValueError(
            f"`{name}` comes with code of its own ({foreign[0]}), which would not be run: `{config.model_type}` of "
            "Transformers is another model. Only the families of Transformers itself can be made smaller."
        )


def _wrapped_prefix(name: str) -> str:
    """Returns what all names of weights begin with where a wrapper was saved; empty where none was."""
    # One file of a model in several parts says enough.
    parts = sorted(Path(name).glob("model*.safetensors"))
    path = parts[0] if parts else _file_of(name, "model.safetensors")
    if path is None:
        return ""
    try:
        with safe_open(os.fspath(path), "pt") as weights:
            names = list(weights.keys())
    except (SafetensorError, OSError):  # the loader says what is wrong with it
        return ""
    found = {match[0] if (match := _WRAPPED.match(key)) else "" for key in names}
    return found.pop() if len(found) == 1 else ""


def _encoder_names(model: PreTrainedModel) -> set[str]:
    """The weights of the base model but its pooler, by their names in `model`."""
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    return {f"{prefix}{name}" for name in model.base_model.state_dict() if not name.startswith("pooler.")}


def _check_encoder(model: PreTrainedModel, name: str, info: dict[str, Any], misshapen: dict[str, str], own: set[str]) -> None:
    missing, unexpected = sorted({*info["missing_keys"]} & own), sorted(info["unexpected_keys"])
    shapes = [f"`{key}` has shape {misshapen[key]}" for key in sorted(misshapen.keys() & own)]
    layer_map = FAMILIES.get(model.config.model_type)
    # A pruned Shrp model has checked what its files hold beyond it, and knows which of it is a leftover of Transformers 4.
    is_checked = getattr(model.config, "kept_heads", None) is not None
    left = [] if layer_map is None or is_checked else [key for key in unexpected if f"{layer_map.layers}." in key]
    if not (missing or shapes or left):
        return
    found = [f"{len(missing)} weights are missing, the first is `{missing[0]}`"] if missing else []
    found += shapes[:1]
    others = unexpected if missing else left
    found += [f"the files hold {len(others)} that have no place in it, the first is `{others[0]}`"] if others else []
    hints = [hint for pattern, hint in _HINTS.items() if any(re.search(pattern, key) for key in unexpected)]
    family = next((word for key in unexpected if (word := key.partition(".")[0]) in _FAMILIES), model.base_model_prefix)
    if family != model.base_model_prefix:
        hints.append(f"They are those of another family (`{family}`): correct `model_type` in its config.")
    hints.append("Save the whole model again, by its own `save_pretrained` (unwrapped: `model.module`).")
    raise ValueError(
        f"The encoder of `{name}` (`{model.config.model_type}`, {model.config.num_hidden_layers} layers by its config) is not "
        f"that of its files: {'; '.join(found)}. {hints[0]}"
    )
