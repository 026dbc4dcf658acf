"""A model with the task head that it was saved with, and what makes its inputs."""

import re
from typing import Any

import transformers
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, PreTrainedModel


def load_for_export(name: str) -> tuple[PreTrainedModel, Any]:
    """Loads the model that a checkpoint names as its architecture, and its tokenizer or image processor.

    Args:
        name: Hub id or directory.

    Returns:
        The model in evaluation mode, and the tokenizer (for images the processor); None where there is none.

    Raises:
        ValueError: The checkpoint does not say which architecture it is, or Transformers has no Auto class for it.
    """
    config = AutoConfig.from_pretrained(name)
    architectures = config.architectures or []
    if not architectures:
        raise ValueError(f"`model` {name!r} names no architecture in its config: load it with its class, and save it again.")
    head = re.search(r"For[A-Z]\w+$", architectures[0])
    auto = getattr(transformers, f"AutoModel{head.group() if head else ''}", None)
    if auto is None:
        raise ValueError(f"`model` {name!r} is a {architectures[0]}, for which Transformers has no Auto class.")
    model = auto.from_pretrained(name).eval()
    processor = AutoImageProcessor if model.main_input_name == "pixel_values" else AutoTokenizer
    try:
        return model, processor.from_pretrained(name)
    except (OSError, ValueError, ImportError):
        return model, None
