"""One of four markers for every test, and which tests two workers (pytest-xdist) must not part."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

REAL = Path(__file__).parent / "real"
KINDS = {"fast", "process", "real", "soak"}

# how long an example takes says something about the machine only
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist and before -m look at the markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not KINDS & {mark.name for mark in item.iter_markers()}:
            item.add_marker("real" if REAL in item.path.parents else "fast")
        if not item.get_closest_marker("xdist_group"):
            # fixtures of a module, such as engines, are made once
            item.add_marker(pytest.mark.xdist_group(group_of(item.path)))


def group_of(path: Path) -> str:
    """The file; tests/real/ring is a whole, because all files in it share one running system."""
    shared = REAL / "ring"
    return str((shared if shared in path.parents else path).relative_to(REAL.parent))
