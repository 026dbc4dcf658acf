"""Claims: of several runs that share a directory, one does a piece of work; a claim dies with its process."""

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def claim(path: Path) -> Iterator[bool]:
    """Claims what `path` stands for, for as long as the context lasts.

    The file is locked by the kernel (`flock`), so the claim of a process that was killed is free at once, whatever the
    file says; it holds process, host and time for people who look. It stays behind, empty of meaning.

    Args:
        path: The file; its directory is made.

    Yields:
        Whether the claim is ours. False: another process has it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        file.flush()
        yield True
