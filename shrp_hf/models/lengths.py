"""How many tokens a model can read; longer lengths are clamped, and said."""

import logging
from collections.abc import Iterable
from typing import Any

logger = logging.getLogger(__name__)

# Their positions begin behind the padding index; a model is asked itself, a config only says its family.
_BEHIND_PADDING = ("camembert", "mpnet", "roberta", "shrp_roberta", "xlm-roberta")


def num_positions(model: Any) -> int | None:
    """Most tokens that a text model has positions for, special tokens included; None where nothing limits them.

    Args:
        model: A model, or its config.
    """
    config = getattr(model, "config", model)
    most = getattr(config, "max_position_embeddings", None)
    if most is None:
        return None
    if config is model:
        padding = getattr(config, "pad_token_id", None) if config.model_type in _BEHIND_PADDING else None
    else:
        embeddings = getattr(getattr(model, "base_model", model), "embeddings", None)
        padding = getattr(getattr(embeddings, "position_embeddings", None), "padding_idx", None)
    return most - (0 if padding is None else padding + 1)


def fitting_length(length: int, models: Iterable[Any] = (), tokenizer: Any = None, name: str = "max_length") -> int:
    """Returns `length`, or the most tokens that all models and the tokenizer take where that is less; then logs one line.

    Args:
        length: Tokens that were asked for.
        models: Models or configs.
        tokenizer: The tokenizer, whose own limit counts too.
        name: What the line calls the length.
    """
    limits = [(most, f"positions of {type(model).__name__}") for model in models if (most := num_positions(model)) is not None]
    if tokenizer is not None:
        limits.append((tokenizer.model_max_length, "tokens that the tokenizer allows"))
    most, of = min(limits, key=lambda limit: limit[0], default=(length, ""))
    if length <= most:
        return length
    logger.warning("`%s` %d is more than the %d %s: %d is taken.", name, length, most, of, most)
    return most
