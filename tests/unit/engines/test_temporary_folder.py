"""Folders of processes that were killed are deleted, and no others."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from quatro_ray.engines.temporary_folder import TemporaryFolder

pytestmark = pytest.mark.process
MAKE = (
    "import sys, time; from quatro_ray.engines.temporary_folder import TemporaryFolder; "
    "folder = TemporaryFolder('used-'); print(folder.path, flush=True); time.sleep(600)"
)


def test_only_folders_that_no_process_uses_are_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    other = subprocess.Popen([sys.executable, "-c", MAKE], stdout=subprocess.PIPE, text=True, env=environment(tmp_path))
    assert other.stdout is not None
    of_other = Path(other.stdout.readline().strip())
    not_ours = tmp_path / "another"
    not_ours.mkdir()
    try:
        for path in (of_other, not_ours):
            (path / "file").write_text("x")
            os.utime(path, (0, 0))
        TemporaryFolder("used-").close()
        assert (of_other / "file").exists()
    finally:
        other.send_signal(signal.SIGKILL)
        other.wait(60)
    mine = TemporaryFolder("used-")
    assert not of_other.exists() and not_ours.exists() and mine.path.exists()
    new = tmp_path / "used-new"
    new.mkdir()
    TemporaryFolder("used-").close()
    assert new.exists() and mine.path.exists()
    mine.close()
    mine.close()
    assert not mine.path.exists()


def environment(folder: Path) -> dict[str, str]:
    return os.environ | {"TMPDIR": str(folder), "PYTHONPATH": os.pathsep.join(sys.path)}
