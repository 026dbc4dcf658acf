"""What a model costs before it runs: parameters in three conventions, FLOPs, memory."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from shrp_hf.defaults import SEED
from shrp_hf.models.lengths import num_positions


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a base model, without its task head, in the conventions that papers use.

    SHRP's 88.5% (arXiv 2512.20635) is of `encoder_and_pooler`; it is 69.2% of `whole`: always show all three.

    Args:
        encoder: The layers, with whatever stands between embeddings and pooler.
        encoder_and_pooler: The same and the pooler, where the model has one.
        whole: The whole base model, embeddings included.
        embeddings: The embeddings.
    """

    encoder: int
    encoder_and_pooler: int
    whole: int
    embeddings: int

    def reduction_from(self, baseline: "ParameterCount") -> dict[str, float]:
        """Returns the share of the baseline's parameters that is gone, 0 to 1, in each convention."""
        names = ("encoder", "encoder_and_pooler", "whole")
        return {name: 1 - getattr(self, name) / getattr(baseline, name) for name in names}


def count_parameters(model: nn.Module) -> ParameterCount:
    """Counts parameters, shared ones once; router usage and other buffers are not parameters.

    Args:
        model: A base model or one with a task head (not counted), on any device, "meta" included.

    Raises:
        ValueError: The base model has no `embeddings` module, so the conventions do not apply.
    """
    base = _base_model(model)
    if not isinstance(getattr(base, "embeddings", None), nn.Module):
        raise ValueError(f"`model` must be an encoder with an `embeddings` module, got {type(base).__name__}.")
    whole = _num_parameters(base)
    embeddings = _num_parameters(base.embeddings)
    pooler = _num_parameters(getattr(base, "pooler", None))
    return ParameterCount(whole - embeddings - pooler, whole - embeddings, whole, embeddings)


def count_flops(model: nn.Module, batch_size: int, length: int) -> int:
    """Counts the FLOPs of one forward pass, task head included; a multiply-add is 2.

    Counted while the model runs in eager attention, because torch's counter does not see sdpa on CPU; the model's own
    attention implementation, its training flags and its usage counters are as before afterwards.

    Args:
        model: A Transformers model on any device; on "meta" nothing is computed.
        batch_size: Sequences (images) in the batch.
        length: Tokens per sequence; an image model ignores it, its config says how many patches there are.

    Raises:
        ValueError: `batch_size` or `length` is below 1, or `length` is longer than the model's positions.
    """
    inputs = random_inputs(model, batch_size, length)
    implementation = model.config._attn_implementation
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.set_attn_implementation("eager")
    for parameter in trained:  # torch's counter stumbles over a view of a parameter, which is all that an empty layer adds
        parameter.requires_grad_(False)
    try:
        # What a model makes by the way (positions, say) is made where it is, whatever its forward says.
        with evaluating(model), torch.no_grad(), model.device, FlopCounterMode(display=False) as counter:
            model(**inputs)
    finally:
        model.set_attn_implementation(implementation)
        for parameter in trained:
            parameter.requires_grad_(True)
    return counter.get_total_flops()


def random_inputs(model: nn.Module, batch_size: int, length: int, seed: int = SEED) -> dict[str, torch.Tensor]:
    """Draws a batch that fits a model: token ids (batch, length), or pixels (batch, channels, height, width).

    No id is the padding token, so every model of a comparison sees `batch_size * length` real tokens.

    Raises:
        ValueError: `batch_size` or `length` is below 1, or `length` is longer than the model's positions.
    """
    config = model.config
    for name, value in (("batch_size", batch_size), ("length", length)):
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
    weight = next(model.parameters())
    generator = torch.Generator().manual_seed(seed)
    if getattr(model, "main_input_name", "input_ids") == "pixel_values":
        size = config.image_size if isinstance(config.image_size, Sequence) else (config.image_size,) * 2
        pixels = torch.randn(batch_size, config.num_channels, *size, generator=generator)
        return {"pixel_values": pixels.to(weight.device, weight.dtype)}
    longest = num_positions(model)
    if longest is not None and length > longest:
        raise ValueError(f"`length` must be at most {longest}, the positions that the model has, got {length}.")
    ids = torch.randint(config.vocab_size, (batch_size, length), generator=generator)
    padding = getattr(config, "pad_token_id", None)
    if padding is not None:
        ids[ids == padding] = (padding + 1) % config.vocab_size
    if type(model).__name__.endswith("ForMultipleChoice"):
        ids = ids.unsqueeze(1)  # one choice
    return {"input_ids": ids.to(weight.device)}


def peak_memory(call: Callable[[], object], device: str | torch.device = "cpu") -> int:
    """Returns the most bytes that `call` held at any moment, beyond what was held before it.

    To include a model's weights, gradients and optimizer states, build them inside the call and do two training steps:
    the first one creates the optimizer's states.

    On a GPU it reads torch's allocator. On a CPU it adds up the allocations and releases in the record of torch's
    profiler: exact and repeatable, while the resident set of a process (`ru_maxrss`) never shrinks, counts libraries
    and keeps freed pages, which hides differences of a few percent. Scratch memory of math libraries is not seen.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it reports its start and end on stderr otherwise
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Puts models in evaluation mode and every module back into its own afterwards."""
    flags = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


def _base_model(model: nn.Module) -> nn.Module:
    while (base := getattr(model, "base_model", model)) is not model:  # PEFT and task heads nest
        model = base
    return model


def _num_parameters(module: nn.Module | None) -> int:
    return 0 if module is None else sum(parameter.numel() for parameter in module.parameters())
