"""Runs cases in forked processes with limits, so that a hang, a crash or a huge allocation is an outcome, not the end."""

import multiprocessing
import os
import resource
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

# Nothing was imported for it but what the parent has: a fork takes milliseconds, a fresh interpreter seconds.
FORK = multiprocessing.get_context("fork")
SPARE_MEMORY = 4 * 2**30  # beyond what the process maps when it starts; a tiny model needs next to nothing


def limit_memory(spare: int = SPARE_MEMORY) -> None:
    """Lets this process map so many bytes more; what asks for more gets a MemoryError."""
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + spare,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def silence(log: str | Path = os.devnull) -> None:
    """Sends what this process prints, from C too, to a file."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.close(descriptor)


def _serve(run: Callable[[Any], Any], cases: Sequence[Any], connection: Connection) -> None:
    limit_memory()
    silence()
    while (index := connection.recv()) is not None:
        connection.send(run(cases[index]))
    os._exit(0)


class _Worker:
    """One child, and the case that it is at."""

    def __init__(self, run: Callable[[Any], Any], cases: Sequence[Any]) -> None:
        self.connection, theirs = FORK.Pipe()
        self.process = FORK.Process(target=_serve, args=(run, cases, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self.index: int | None = None
        self.deadline = 0.0

    def give(self, index: int | None, seconds: float) -> None:
        self.index, self.deadline = index, time.monotonic() + seconds
        self.connection.send(index)

    def answer(self) -> tuple[tuple[Any, Any], bool]:
        """What became of its case, and whether it lives on."""
        if self.connection.poll():
            try:
                return (self.connection.recv(), None), True
            except EOFError:
                self.process.join()
                return (None, f"died with exit code {self.process.exitcode}"), False
        self.process.kill()
        self.process.join()
        return (None, "hung"), False


def in_children(
    run: Callable[[Any], Any], cases: Sequence[Any], seconds: float = 60.0, num_workers: int = 2
) -> list[tuple[Any, Any]]:
    """Calls `run` on every case, many in one child.

    Returns:
        Per case (what `run` returned, None), or (None, what happened) for one that hung or killed its process.
    """
    results: list[tuple[Any, Any]] = [(None, None)] * len(cases)
    todo = list(range(len(cases)))[::-1]
    workers = [_Worker(run, cases) for _ in range(min(num_workers, len(cases)))]
    for worker in workers:
        worker.give(todo.pop(), seconds)
    while workers:
        ready = wait([worker.connection for worker in workers], timeout=1.0)
        for worker in list(workers):
            if worker.connection not in ready and time.monotonic() < worker.deadline:
                continue
            results[worker.index], lives = worker.answer()
            workers.remove(worker)
            if todo:
                workers.append(worker if lives else _Worker(run, cases))
                workers[-1].give(todo.pop(), seconds)
            elif lives:
                worker.give(None, seconds)
                worker.process.join()
    return results
