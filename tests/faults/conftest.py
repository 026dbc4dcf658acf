"""Counts what the fault tests tried, over all their processes, and prints it at the end."""

import os
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, settings

_KEY = "faults"
_SETTINGS = {"derandomize": True, "deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("fast", max_examples=10, **_SETTINGS)
settings.register_profile("full", max_examples=100, **_SETTINGS)
settings.load_profile(os.environ.get("FAULTS_PROFILE", "fast"))


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
