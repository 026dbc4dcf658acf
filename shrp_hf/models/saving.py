"""Saving: whole or not at all, and with the code that opens the model where shrp_hf is not installed."""

import json
import os
import platform
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from transformers.dynamic_module_utils import get_relative_import_files

_CONFIG = "config.json"
_A_DAY = 24 * 60 * 60


class SavingMixin:
    """`save_pretrained` and `push_to_hub` of every Shrp model. Mixed in before a Transformers class."""

    auto_classes: ClassVar[Mapping[str, str]] = {}
    _ships_code = True

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, with_code: bool = True, **kwargs: Any) -> None:
        """Saves as Transformers does, but whole or not at all (written beside the target, then moved there), with the code.

        The code is some `.py` files, which the config names for every Auto class: so the model opens with
        `trust_remote_code=True` where shrp_hf is not installed. A class of your own that you registered for an Auto class
        ships its own code, as in Transformers.

        Args:
            save_directory: Where to.
            *args: As in Transformers.
            with_code: False leaves the code out; whoever opens the model then needs shrp_hf.
            **kwargs: As in Transformers. A `distributed_checkpoint` is Transformers' own, and has no code.

        Raises:
            OSError: It cannot be written: a full disk, no permission, a file in the place of the directory, or a `.py` file
                there that has a name of ours and is not from us.
        """
        if not kwargs.get("is_main_process", True) or kwargs.get("distributed_checkpoint", False):
            super().save_pretrained(save_directory, *args, **kwargs)
            return
        if kwargs.pop("push_to_hub", False):
            repo_id = kwargs.pop("repo_id", Path(save_directory).name)
            hub = {name: kwargs.pop(name) for name in ("commit_message", "private", "create_pr", "token") if name in kwargs}
            self.save_pretrained(save_directory, *args, with_code=with_code, **kwargs)
            self.push_to_hub(repo_id, with_code=with_code, **hub)
            return
        target = Path(save_directory)
        try:
            target.mkdir(parents=True, exist_ok=True)
            for left in filter(_is_left_behind, target.glob(".saving-*")):
                shutil.rmtree(left, ignore_errors=True)
            prefix = f".saving-{os.getpid()}-{platform.node()}-"
            with tempfile.TemporaryDirectory(dir=target, prefix=prefix) as staged:
                super().save_pretrained(staged, *args, **kwargs)
                self._settle_code(Path(staged), with_code and self._ships_code)
                _publish(Path(staged), target)
        except Exception as error:
            if not isinstance(error, OSError) and type(error).__name__ != "SafetensorError":
                raise
            raise OSError(f"The model cannot be saved to `{target}` ({error}): what was there is as it was.") from error

    def push_to_hub(self, repo_id: str, *args: Any, with_code: bool = True, **kwargs: Any) -> str:
        """Uploads as Transformers does.

        Args:
            repo_id: The repository, for example "org/shrp-bert-sst2".
            *args: Further arguments of Transformers' method, and so are `kwargs`.
            with_code: Upload the code with it, as `save_pretrained` writes it.
            **kwargs: For example `private`, `token`, `commit_message`.
        """
        self._ships_code = with_code
        try:
            return super().push_to_hub(repo_id, *args, **kwargs)
        finally:
            del self._ships_code

    def _settle_code(self, folder: Path, ships: bool) -> None:
        """Writes the code into a folder that holds a saved model, or takes out what Transformers wrote of it."""
        ours = {path.rpartition(".")[2] for path in self.auto_classes.values()}
        is_derived = type(self).__name__.removeprefix("FSDP") not in ours
        if not (folder / _CONFIG).exists() or (is_derived and type(self)._auto_class is not None):
            return  # an adapter alone, a process that does not write, or the code of another's class
        for path in folder.glob("*.py"):
            path.unlink()
        if ships:
            self._write_code(folder)
        _write_auto_map(folder, self.auto_classes if ships else None)

    def _write_code(self, folder: Path) -> None:
        # Not `type(self)`: FSDP wraps the class in one of torch's, and users derive from it.
        module = self.auto_classes["AutoModel"].partition(".")[0]
        name = next(c.__module__ for c in type(self).__mro__ if c.__module__.rpartition(".")[2] == module)
        source = Path(sys.modules[name].__file__)
        for path in [source, *map(Path, get_relative_import_files(source))]:
            shutil.copyfile(path, folder / path.name)


def _write_auto_map(folder: Path, classes: Mapping[str, str] | None) -> None:
    """Lets `config.json` name these classes for Transformers' loader of remote code, and no others."""
    path = folder / _CONFIG
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.pop("auto_map", None) == classes:
        return
    config |= {"auto_map": dict(classes)} if classes else {}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _publish(staged: Path, target: Path) -> None:
    """Moves the staged files, the config last, and removes weights and code of an earlier save that have no successor.

    Killed in between, it leaves the earlier model, the new one, or no config at all: never a config beside weights or code
    that are not its own.
    """
    names = {path.name for path in staged.iterdir()}
    weights = _weights(staged)
    if _CONFIG in names:
        _check_overwritten(staged, target)
        held, rest = _weights(target) | _code(target), names - weights
        unchanged = all(_is_same(staged / name, target / name) for name in rest)
        is_one_move = len(weights) == 1 and held <= names and unchanged
        if not is_one_move:
            (target / _CONFIG).unlink(missing_ok=True)
        for name in held - names:
            (target / name).unlink(missing_ok=True)
    for name in sorted(names, key=lambda name: (name == _CONFIG, name)):
        (staged / name).replace(target / name)


def copy_code(source: Path, target: Path) -> None:
    """Copies the code of the model saved in `source` to `target`.

    Raises:
        FileExistsError: See `SavingMixin.save_pretrained`.
    """
    _check_overwritten(source, target)
    for path in source.glob("*.py"):
        shutil.copyfile(path, target / path.name)


def _check_overwritten(source: Path, target: Path) -> None:
    ours = _code(target)
    for path in sorted(source.glob("*.py")):
        there = target / path.name
        if path.name not in ours and there.exists() and not _is_same(path, there):
            raise FileExistsError(
                f"its code has a file `{path.name}`, and the one there is not ours: choose another directory, or give "
                "`with_code=False`"
            )


def _is_same(one: Path, other: Path) -> bool:
    return other.is_file() and one.read_bytes() == other.read_bytes()


def _weights(folder: Path) -> set[str]:
    patterns = ("model*.safetensors", "model*.safetensors.index.json")
    return {path.name for pattern in patterns for path in folder.glob(pattern)}


def _code(folder: Path) -> set[str]:
    """Names of the files that an earlier save of a Shrp model wrote there so that it opens, found from their own imports."""
    roots = [path for kind in ("configuration", "modeling") for path in folder.glob(f"{kind}_shrp_*.py")]
    try:
        imported = [Path(file) for root in roots for file in get_relative_import_files(root)]
    except OSError:  # somebody took one away
        return {path.name for path in roots}
    return {path.name for path in [*roots, *imported] if path.parent == folder and path.is_file()}


def _is_left_behind(staged: Path) -> bool:
    """Whether the process that saved there was killed; several may save to one directory."""
    match = re.fullmatch(r"\.saving-(\d+)-(.*)-\w+", staged.name)
    if match is None:
        return True
    try:
        if os.name != "posix" or match[2] != platform.node():
            return time.time() - staged.stat().st_mtime > _A_DAY
        os.kill(int(match[1]), 0)  # only asks
    except PermissionError:
        return False  # it runs, as another user
    except (ProcessLookupError, OverflowError):
        return True
    except FileNotFoundError:  # its writer has just moved it
        return False
    return False
