"""What a model built anew from class and config takes over; what it would lose without a word is refused."""

import copy
import inspect
import types
from collections.abc import Iterator, Mapping

import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel
from transformers import initialization as init

from .layer_map import LayerMap

_PACKAGE = __name__.rpartition(".")[0]
_VALUES = (bool, int, float, str, tuple, type(None), types.FunctionType, types.BuiltinFunctionType)
_STATES = ("training", "gradient_checkpointing")  # how a module is used, not what it computes
_WRAPPERS = ("_hf_hook", "_original_forward")  # of accelerate: devices and autocast, the same outputs
_MERGE = (
    "is adapted in place (PEFT): merge the adapter first, by `PeftModel.from_pretrained(base, adapter).merge_and_unload()`"
)
_CUT_FIRST = "is quantised: prune the model as it was before, and quantise the result"


def wrapping(module: nn.Module) -> str | None:
    """Says what keeps `module` from computing with its own weight alone, and the way out; None where nothing does."""
    own = module._parameters.keys()
    if hasattr(module, "base_layer") or type(module).__module__.startswith("peft."):
        return _MERGE
    if parametrize.is_parametrized(module):
        name = next(iter(module.parametrizations))
        return f'is parametrized: `torch.nn.utils.parametrize.remove_parametrizations(module, "{name}")` first'
    for name in own:
        if name.endswith("_orig"):
            undo = "prune.remove" if f"{name[:-5]}_mask" in module._buffers else "remove_spectral_norm"
            return f'has no weight of its own (`{name}`): `torch.nn.utils.{undo}(module, "{name[:-5]}")` first'
        if name.endswith("_g") and f"{name[:-2]}_v" in own:
            return f'has no weight of its own (`{name}`): `torch.nn.utils.remove_weight_norm(module, "{name[:-2]}")` first'
    if is_quantised(module):
        return _CUT_FIRST
    if "forward" in vars(module) and not any(name in vars(module) for name in _WRAPPERS):
        return "has a `forward` of its own, set on the instance: `del module.forward` first"
    return None


def is_quantised(module: nn.Module) -> bool:
    """Whether a module holds its weight in another form than numbers in rows and columns."""
    weight, kind = module._parameters.get("weight"), type(module).__module__
    if "quantized" in kind or kind.startswith(("bitsandbytes", "torchao")) or hasattr(module, "qweight"):
        return True
    is_packed = weight is not None and (not weight.is_floating_point() or type(weight.data).__module__.startswith("torchao"))
    return isinstance(module, nn.Linear) and is_packed


def check_plain(layers: Mapping[int, nn.Module], layer_map: LayerMap) -> None:
    """Refuses matrices with heads or neurons that are more than a weight and a bias.

    Args:
        layers: Layers by their index.
        layer_map: Where the matrices are; those that a layer has no more are skipped.

    Raises:
        ValueError: Names the first, and the way out.
    """
    for i, layer in layers.items():
        modules = dict(layer.named_modules())
        for path in (*layer_map.head_paths, *layer_map.neuron_paths):
            module = modules.get(path)
            if module is None:
                continue
            ours = type(module) is nn.Linear or type(module).__module__.startswith(f"{_PACKAGE}.")
            reason = wrapping(module) or (None if ours else f"is a {type(module).__name__}, not `nn.Linear`: replace it first")
            if reason is not None:
                raise ValueError(f"`{path}` of layer {i} {reason}.")


def check_copyable(model: nn.Module) -> None:
    """Refuses a model that torch cannot copy: one in which a weight is computed from others and kept, as masks of torch do.

    Raises:
        ValueError: Names the module, and the way out.
    """
    for name, module in model.named_modules():
        if any(isinstance(value, torch.Tensor) and not value.is_leaf for value in vars(module).values()):
            raise ValueError(f"`{name}` {wrapping(module) or 'keeps a tensor that was computed with a gradient: drop it'}.")


def check_as_built(model: PreTrainedModel, extended: type | None = None) -> None:
    """Refuses a model that has something which its class and config do not build, and a rebuild would lose.

    Modules are compared by class, parameters by shape, and of each module the plain attributes, such as the probability of a
    dropout. Weights, devices, hooks and what is frozen do not matter.

    Args:
        model: The model.
        extended: A class that extends the model's own, which is then known.

    Raises:
        ValueError: Names what differs, and the way out.
    """
    kind = type(model)
    known = kind.__module__.startswith(("transformers.models.", f"{_PACKAGE}."))
    if not known and not (extended is not None and issubclass(extended, kind)):
        raise ValueError(
            f"`model` is a {kind.__module__}.{kind.__qualname__}, no class of Transformers: the code of that class would be "
            "lost. If it only adds a loss or the like, load its files by the class of Transformers that it extends."
        )
    with torch.device("meta"), init.no_init_weights():
        built = kind(copy.deepcopy(model.config), **pooler_options(model, kind))
    found = list(_differences(model, built))
    if found:
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise ValueError(
            f"`model` is not what `{kind.__name__}` and its config build, and what differs would be lost: {found[0]}{more}. "
            "Undo it, or say it in the config (`from_pretrained(..., hidden_act=..., hidden_dropout_prob=...)`)."
        )


def _differences(model: nn.Module, built: nn.Module) -> Iterator[str]:
    expected, modules = dict(built.named_modules()), dict(model.named_modules())
    for name, module in modules.items():
        where = f"`{name}`" if name else "the model"
        other = expected.get(name)
        if (reason := wrapping(module)) is not None:
            yield f"{where} {reason}"
        elif other is None and name.rpartition(".")[0] in expected:
            yield f"{where} ({type(module).__name__}) was added"
        elif other is not None and type(module) is not type(other):
            yield f"{where} is {type(module).__name__} instead of {type(other).__name__}"
        elif other is not None:
            yield from _other_values(where, module, other)
    for name in expected.keys() - modules.keys():
        yield f"`{name}` ({type(expected[name]).__name__}) is missing"


def _other_values(where: str, module: nn.Module, other: nn.Module) -> Iterator[str]:
    for name, value in vars(other).items():
        if isinstance(value, _VALUES) and not name.startswith("_") and name not in _STATES:
            found = vars(module).get(name)
            if found is not value and found != value:
                yield f"{where} has `{name}` {found!r} instead of {value!r}"
    shapes, found_shapes = (
        {name: tuple(tensor.shape) for name, tensor in m._parameters.items() if tensor is not None} for m in (other, module)
    )
    for name in shapes.keys() | found_shapes.keys():
        if shapes.get(name) != found_shapes.get(name):
            yield f"`{name}` of {where} has shape {found_shapes.get(name)} instead of {shapes.get(name)}"


def pooler_options(model: PreTrainedModel, stock_class: type[PreTrainedModel]) -> dict[str, bool]:
    """Returns the arguments with which `stock_class` is built with a pooler if `model` has one, and else without."""
    has_option = "add_pooling_layer" in inspect.signature(stock_class.__init__).parameters
    return {"add_pooling_layer": model.pooler is not None} if has_option and hasattr(model, "pooler") else {}


def take_weights_(target: nn.Module, source: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Gives `target` the parameters in `weights`, not copied, and the buffers of `source`."""
    for name, parameter in target.named_parameters(remove_duplicate=False):
        if name in weights:  # `assign=True` writes this flag into what it is given, and would thaw frozen weights
            parameter.requires_grad_(weights[name].requires_grad)
    target.load_state_dict(weights, assign=True)
    for name, buffer in source.named_buffers():  # those that no state dict holds would stay where they were built
        owner, _, attribute = name.rpartition(".")
        target.get_submodule(owner)._buffers[attribute] = buffer
