"""A keeper ends with the process that started it, and knows it where that is process 1, as in a container."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.process

PROGRAM = "import pathlib, os\npathlib.Path('made').write_text(str(os.getpid()))\n"
START = "import subprocess, sys\nfrom quatro_ray.isolation import keeper\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "program.py").write_text(PROGRAM)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, sys.path)]))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_parent_that_is_process_1(folder: Path) -> None:
    """The driver is process 1 of `docker run IMAGE quatro-ray train`; so is its worker's parent."""
    namespace = ["unshare", "--map-root-user", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if subprocess.run([*namespace, "true"], capture_output=True).returncode != 0:
        pytest.skip("process namespaces are not allowed here")
    code = f"{START}import os\nassert os.getpid() == 1\nsys.exit(subprocess.run(keeper.command('program')).returncode)"
    done = subprocess.run([*namespace, sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert (folder / "made").exists()


def test_a_parent_that_died_before(folder: Path) -> None:
    """The keeper has another parent by now, whichever that is."""
    command = [sys.executable, "-m", "quatro_ray.isolation.keeper", "program", str(os.getppid())]
    assert subprocess.run(command, timeout=60).returncode == 1
    assert not (folder / "made").exists()


def test_a_parent_that_dies_later(folder: Path) -> None:
    (folder / "program.py").write_text(f"{PROGRAM}import time\ntime.sleep(600)\n")
    code = f"{START}import time\nsubprocess.Popen(keeper.command('program'))\ntime.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", code]) as parent:
        deadline = time.monotonic() + 60
        while not (folder / "made").exists() or not (folder / "made").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        parent.kill()
    worker = int((folder / "made").read_text())
    while psutil.pid_exists(worker):
        assert time.monotonic() < deadline
        time.sleep(0.02)
