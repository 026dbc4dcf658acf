"""Files that are written whole or not at all, and errors that say where nothing could be written."""

import os
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

STALE_SECONDS = 60


@contextmanager
def writing_to(target: str | Path) -> Iterator[None]:
    """Names `target` in the error when it cannot be written, which the libraries that write do not.

    Raises:
        OSError: A full disk, no permission, no such directory.
    """
    try:
        yield
    except Exception as error:
        by_torch = "inline_container" in str(error)  # torch.save raises a bare RuntimeError
        if not (isinstance(error, OSError) or type(error).__name__ == "SafetensorError" or by_torch):
            raise
        reason = str(error).splitlines()[0].strip()
        raise OSError(f"`{target}` cannot be written ({reason}): what was there is as it was.") from error


@contextmanager
def written_whole(target: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `target`, and moves what was written there to `target` at the end.

    What a killed process left there is removed, at once where it ran on this machine, else when it is a minute old. Several
    processes may write one target.

    Raises:
        OSError: It cannot be written; `target` is as it was.
    """
    target = Path(target)
    partial = target.with_name(f".{target.name}.{_machine()}.{os.getpid()}.partial")
    with writing_to(target):
        for left in target.parent.glob(f".{target.name}.*.partial"):
            if _is_abandoned(left):
                left.unlink(missing_ok=True)
        try:
            yield partial
            partial.replace(target)
        except BaseException:
            if partial.parent.is_dir():
                partial.unlink(missing_ok=True)
            raise


def remove_staged(folder: Path, pattern: str) -> None:
    """Removes the directories that a killed writer left in `folder`; only for a folder with a single writer."""
    for left in folder.glob(pattern):
        shutil.rmtree(left, ignore_errors=True)


def _machine() -> str:
    return platform.node().replace(".", "-")


def _is_abandoned(partial: Path) -> bool:
    machine, process = partial.name.split(".")[-3:-1]
    if machine == _machine() and process.isdigit():
        return not psutil.pid_exists(int(process))
    try:
        return time.time() - partial.stat().st_mtime > STALE_SECONDS
    except FileNotFoundError:  # its writer has just moved it
        return False
