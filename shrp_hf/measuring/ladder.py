"""A model of layers of many sizes, and the time of each of them while it runs: one call prices them all.

Layers are timed where they stand, one after the other in one model, because that is how they are served: with weights that
the layers before have pushed out of the cache. A single layer that is called again and again finds them there, and looks
faster than it is.
"""

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init

from shrp_hf.families import head_layout
from shrp_hf.models.built import is_shrp
from shrp_hf.models.modeling_shrp import pooler_options
from shrp_hf.pruning import to_shrp

Clock = Callable[[], list[float]]
"""A call of the ladder; returns the seconds of what comes before the layers, of each layer, and of what comes after."""


def build_ladder(model: PreTrainedModel, layers: Sequence[tuple[int, int]], experts: Sequence[int] = ()) -> PreTrainedModel:
    """Builds a model like `model`, with random weights and other layers.

    Args:
        model: A supported encoder; left as it is.
        layers: (heads, neurons) of each ordinary layer.
        experts: Number of experts of each expert layer; they come last.

    Raises:
        ValueError: The family is not supported.
    """
    source = to_shrp(model)
    config = copy.deepcopy(source.config)
    config.num_hidden_layers = len(layers) + len(experts)
    config.kept_heads = [list(range(count)) for count in (*(heads for heads, _ in layers), *experts)]
    config.intermediate_sizes = [*(neurons for _, neurons in layers), *(0 for _ in experts)]
    config.expert_layers, config.pending_layers = list(range(len(layers), config.num_hidden_layers)), []
    config.routed = False
    kinds = getattr(config, "layer_types", None)
    if kinds:  # windowed or full attention: the kind that most layers have
        config.layer_types = [max(set(kinds), key=kinds.count)] * config.num_hidden_layers
    stock = next(c for c in type(source).__mro__ if issubclass(c, PreTrainedModel) and not is_shrp(c))
    with init.no_init_weights():
        ladder = type(source)(config, **pooler_options(source, stock))
    ladder = ladder.to(model.device, model.dtype)
    generator = torch.Generator(model.device).manual_seed(0)
    with torch.no_grad():
        for parameter in ladder.parameters():  # memory as it was found may hold numbers that are slow to compute with
            parameter.uniform_(-0.05, 0.05, generator=generator)
    return ladder.eval()


def time_eager(ladder: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> Clock:
    """Returns a call that runs the ladder in PyTorch.

    Args:
        ladder: From `build_ladder`, on the CPU.
        inputs: The batch.
    """
    layers = head_layout(ladder).layers

    def call() -> list[float]:
        marks: list[float] = []
        with _marking(layers, lambda *_: marks.append(time.perf_counter())), torch.inference_mode():
            start = time.perf_counter()
            ladder(**inputs)
            marks = [start, *marks, time.perf_counter()]
        return [after - before for before, after in zip(marks[:-1], marks[1:], strict=True)]

    return call


@contextmanager
def _marking(layers: Sequence[nn.Module], mark: Callable[..., None]) -> Iterator[None]:
    """Calls `mark` before each layer and after the last one."""
    handles = [layer.register_forward_pre_hook(mark) for layer in layers]
    handles.append(layers[-1].register_forward_hook(mark))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
