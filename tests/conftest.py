"""One of five markers for every test, and which tests two workers (pytest-xdist) must not part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from xdist.scheduler import LoadFileScheduling  # type: ignore[import-untyped]  # has no types

REAL = Path(__file__).parent / "real"
FOLDERS = {REAL: "real", REAL.with_name("deploy"): "deploy"}
"""The marker of tests that have none, by folder."""
RING = "tests/real/ring"
LONGEST = (
    "test_command_line.py",
    "test_learner.py",
    "test_examples.py",
    "test_resume.py",
    "test_chaos.py",
    "test_lora_run.py",
    "ring",
)
"""Files and folders of tests/real that start first, so that neither worker has a long one left at the end."""
APART = "tests/unit/rewards/test_hostile_texts.py"
"""A file whose tests share nothing and wait for deadlines; its tests go to whichever worker is free."""
KINDS = {"fast", "process", "real", "soak", "deploy"}

# how long an example takes says something about the machine only
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


@pytest.hookimpl(tryfirst=True)  # before -m looks at the markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not KINDS & {mark.name for mark in item.iter_markers()}:
            item.add_marker(next((kind for folder, kind in FOLDERS.items() if folder in item.path.parents), "fast"))
    items.sort(key=_place)


def _place(item: pytest.Item) -> int:
    """Return the item's place among the longest, or a later one; only tests/real is sorted."""
    parts = item.path.relative_to(REAL).parts if REAL in item.path.parents else ()
    return LONGEST.index(parts[0]) if parts and parts[0] in LONGEST else len(LONGEST)


class ByFile(LoadFileScheduling):
    """A file stays with one worker, so that fixtures of a module are made once; tests/real/ring stays whole.

    pytest-xdist's own groups (3.8) have no effect under pytest 9.2.
    """

    def _split_scope(self, nodeid: str) -> str:
        path = super()._split_scope(nodeid)
        if path == APART:
            return nodeid
        return RING if path.startswith(f"{RING}/") else path


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFile:
    return ByFile(config, log)
