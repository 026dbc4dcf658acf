"""What the load tests measured, at the end of the run: `make test-load`."""

import time

import psutil
import pytest

FIGURES = []
MIB = 2**20


def resident() -> float:
    """Memory of this process that is in RAM, MiB."""
    return psutil.Process().memory_info().rss / MIB


@pytest.fixture
def figure(request):
    """A call that keeps a line for the end of the run, with the seconds since the test began."""
    began = time.perf_counter()
    return lambda text: FIGURES.append(f"{request.node.name}: {text} ({time.perf_counter() - began:.0f} s)")


def pytest_terminal_summary(terminalreporter):
    for line in FIGURES:
        terminalreporter.write_line(line)
