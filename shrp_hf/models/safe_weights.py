"""Weights are read from safetensors files and from nothing else: a pickle can run code when it is read."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import cached_file

INDEX = "model.safetensors.index.json"
_WHERE = ("subfolder", "revision", "cache_dir", "token", "local_files_only", "force_download", "proxies")


def load_safely(from_pretrained: Callable, source: Any, *args: Any, **kwargs: Any) -> Any:
    """Calls `from_pretrained` of a model class or an Auto class so that it reads safetensors only.

    Args:
        from_pretrained: The bound method.
        source: Hub id or directory.
        *args: As in Transformers.
        **kwargs: As in Transformers.

    Raises:
        ValueError: There are other weights only, or an argument or the index of the weights asks for others.
    """
    stock = from_pretrained.__self__.__name__.removeprefix("Shrp")
    for name in ("use_safetensors", "weights_only"):
        if kwargs.get(name) is False:
            raise ValueError(f"`{name}=False` {_refusal(stock, source)}")
    if source is not None:
        _check_source(source, kwargs, stock)
    try:
        return from_pretrained(source, *args, **(kwargs | {"use_safetensors": True}))
    except OSError as error:
        is_local = Path(source).is_dir()
        if not (any(Path(source).rglob("pytorch_model*.bin*")) if is_local else "cannot be loaded with" in str(error)):
            raise
        raise ValueError(f"`{source}` has no `model.safetensors`, and a pickle {_refusal(stock, source)}") from error


def _check_source(source: Any, kwargs: dict, stock: str) -> None:
    if Path(source).is_file() and Path(source).suffix != ".safetensors":
        raise ValueError(f"`{source}` {_refusal(stock, Path(source).parent)}")
    where = {name: kwargs[name] for name in _WHERE if name in kwargs}
    quiet = {f"_raise_exceptions_for_{kind}": False for kind in ("missing_entries", "gated_repo", "connection_errors")}
    index = None if Path(source).is_file() else cached_file(source, INDEX, **where, **quiet)
    if index is None:
        return
    for name in _files_of(index, source):
        if Path(name).suffix != ".safetensors":
            raise ValueError(f"`{INDEX}` of `{source}` names the file {name!r}, which {_refusal(stock, source)}")
        if Path(name).name != name:
            raise ValueError(f"`{INDEX}` of `{source}` names the file {name!r}, which lies elsewhere: download it again.")
        if Path(source).is_dir() and not Path(index).with_name(name).is_file():
            raise ValueError(f"`{INDEX}` of `{source}` names the file {name!r}, which is not there: download it again.")


def _files_of(index: str, source: Any) -> set[str]:
    """Returns the names in an index, which Transformers would otherwise read without a look."""
    try:
        fields = json.loads(Path(index).read_text(encoding="utf-8"))
        files = fields["weight_map"].values()
        whole = isinstance(fields["metadata"], dict) and files and all(isinstance(name, str) for name in files)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        whole = False
    if not whole:
        raise ValueError(f"`{INDEX}` of `{source}` is damaged: download or save the model again.")
    return set(files)


def _refusal(stock: str, source: Any) -> str:
    return (
        "would be unpickled, which can run code: shrp_hf reads safetensors only. Convert it once, where you trust it, by "
        f"`{stock}.from_pretrained({str(source)!r}).save_pretrained(folder)`, and load that folder."
    )


class SafeWeightsMixin:
    """Loads safetensors only. Mixed in before a Transformers class."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in Transformers; see `load_safely`."""
        return load_safely(super().from_pretrained, pretrained_model_name_or_path, *args, **kwargs)

    @staticmethod
    def _load_pretrained_model(model: Any, state_dict: Any, checkpoint_files: Any, *args: Any, **kwargs: Any) -> Any:
        # What Transformers found in the end, whichever field of a config named it; also the weights of an adapter.
        for name in checkpoint_files or ():
            if Path(name).suffix != ".safetensors":
                raise ValueError(f"`{name}` {_refusal(type(model).__name__.removeprefix('Shrp'), Path(name).parent)}")
        return PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, *args, **kwargs)
