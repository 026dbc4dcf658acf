"""Claims: of several runs that share a directory, one does a piece of work; a claim dies with its process."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


@contextmanager
def claim(path: Path) -> Iterator[bool]:
    """Claims what `path` stands for, for as long as the context lasts.

    The kernel holds the lock, so the claim of a process that was killed is free at once, though its file stays.

    Args:
        path: The file; its directory is made.

    Yields:
        Whether the claim is ours. False: another process has it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, is_singleton=False)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()
