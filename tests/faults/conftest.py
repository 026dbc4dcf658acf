"""Counts what the fault tests tried, over all their processes, and prints it at the end."""

from collections import Counter
from collections.abc import Callable

import pytest

_KEY = "faults"


@pytest.fixture
def count(request) -> Callable[..., None]:
    """Adds to the figures of a group: `count("files", tried=10, refused=9, lost=0)`."""

    def add(group: str, **figures: int) -> None:
        request.node.user_properties.append((_KEY, (group, figures)))

    return add


def pytest_terminal_summary(terminalreporter) -> None:
    groups: dict[str, Counter] = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            for key, value in getattr(report, "user_properties", ()):
                if key == _KEY and report.when == "call":
                    group, figures = value
                    groups.setdefault(group, Counter()).update(figures)
    if groups:
        terminalreporter.section("faults")
    for group, figures in sorted(groups.items()):
        line = ", ".join(f"{name} {figures[name]:,}" for name in figures)
        terminalreporter.write_line(f"{group}: {line}")
