"""Files that are written whole or not at all, and errors that say where nothing could be written."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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

    What a killed process left there is removed once it is a minute old; several processes may write one target.

    Raises:
        OSError: It cannot be written; `target` is as it was.
    """
    target = Path(target)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    with writing_to(target):
        for left in target.parent.glob(f".{target.name}.*.partial"):
            if time.time() - left.stat().st_mtime > STALE_SECONDS:
                left.unlink(missing_ok=True)
        try:
            yield partial
            partial.replace(target)
        except BaseException:
            if partial.parent.is_dir():
                partial.unlink(missing_ok=True)
            raise
