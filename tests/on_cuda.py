"""A pytest plugin (`make test-cuda`): forward passes run on a GPU, what they return is compared on the CPU, as ever."""

import functools
from typing import Any

import torch
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel

DEVICE = "cuda"
_calls: list[str] = []


def pytest_configure() -> None:
    """Has a model move to the GPU for a call, and stay there where a graph is recorded that needs its weights."""
    if not torch.cuda.is_available():
        raise RuntimeError("`-p tests.on_cuda` needs a GPU: torch.cuda.is_available() says that there is none.")
    PreTrainedModel.__call__ = _on_device(PreTrainedModel.__call__)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Says how many calls were made there, so that a run that moved nothing is not taken for a proof."""
    terminalreporter.write_line(f"forward passes on {torch.cuda.get_device_name()}: {len(_calls)}")


def _on_device(call: Any) -> Any:
    is_inside = False

    @functools.wraps(call)
    def moved(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        nonlocal is_inside
        if is_inside:  # the encoder of a classifier
            return call(model, *args, **kwargs)
        args, kwargs = _to(DEVICE, (args, kwargs))
        is_inside = True
        try:
            result = call(model.to(DEVICE), *args, **kwargs)
        finally:
            is_inside = False
            if not torch.is_grad_enabled():
                model.cpu()
        _calls.append(type(model).__name__)
        return _to("cpu", result)

    return moved


def _to(device: str, values: Any) -> Any:
    return tree_map(lambda value: value.to(device) if isinstance(value, torch.Tensor) else value, values)
