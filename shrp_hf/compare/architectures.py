"""Models of a given architecture: the first layers of a dense model, and empty models to count and time."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel


def first_layers(model: PreTrainedModel, count: int) -> PreTrainedModel:
    """Returns a new model of the first `count` layers of a dense Shrp model; all else is the same.

    Raises:
        ValueError: The model has no that many layers, or is not dense.
    """
    config = copy.deepcopy(model.config)
    if not 1 <= count <= config.num_hidden_layers or config.kept_heads is not None or config.expert_layers:
        raise ValueError(f"`count` must be between 1 and the {config.num_hidden_layers} layers of a dense model, got {count}.")
    config.num_hidden_layers = count
    short = type(model)(config).to(model.device, model.dtype)
    weights = model.state_dict()
    short.load_state_dict({name: weights[name] for name in short.state_dict()})
    return short.train(model.training)


def empty_model(dense: PreTrainedModel, cell: Mapping[str, Any]) -> PreTrainedModel:
    """Builds the architecture of a cell with random weights, on the default device.

    Args:
        dense: The dense Shrp model it was made from.
        cell: The cell's record, of which `kept` and `expert_layers` are read.
    """
    config = copy.deepcopy(dense.config)
    kept = [list(heads) for heads in cell["kept"]]
    config.num_hidden_layers = len(kept)
    config.kept_heads = None if all(len(heads) == config.num_attention_heads for heads in kept) else kept
    config.expert_layers, config.routed = list(cell["expert_layers"]), False
    with torch.random.fork_rng():
        return type(dense)(config).eval()


def shape_of(cell: Mapping[str, Any]) -> str:
    """What a cell's cost depends on, as a name: ordinary layers by their heads, expert layers by their experts.

    Which of the layers has how many makes no difference, so cells that differ only in that are one shape.
    """
    counts = [len(heads) for heads in cell["kept"]]
    experts = sorted(counts[layer] for layer in cell["expert_layers"])
    heads = sorted(count for layer, count in enumerate(counts) if layer not in cell["expert_layers"])
    return f"heads {'+'.join(map(str, heads)) or 0}, experts {'+'.join(map(str, experts)) or 0}"
