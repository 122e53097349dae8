"""The finished run that tests of commands read, damage and read again."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.unit.jobs.finished_run import write_finished_run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_finished_run(tmp_path_factory.mktemp("finished") / "run")


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(finished, tmp_path / "run"))
