"""What an engine shares goes when it is killed with everything around it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from quatro_ray.actors.shared_memory import check_shared_memory
from quatro_ray.errors import ConfigError
from quatro_ray.orchestrator.host import check_host
from tests.make import config

pytestmark = pytest.mark.process

SHM = Path("/dev/shm")


def test_too_little_of_it_is_told_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    check_shared_memory("engines of several devices")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=64 << 20))
    with pytest.raises(
        ConfigError, match=r"need 512 MiB of shared memory, and /dev/shm on .* has 64 MiB free: .*shm-size"
    ):
        check_shared_memory("engines of several devices")
    several = config(generator={"tensor_parallel_size": 2})
    with pytest.raises(ConfigError, match=r"engines of several devices need 512 MiB of shared memory"):
        check_host(several)


PROCESS = """
import sys, time
from multiprocessing import get_context
from multiprocessing.shared_memory import SharedMemory
from quatro_ray.actors.shared_memory import detach_resource_tracker

def share(names):
    segment, semaphore = SharedMemory(create=True, size=1000), get_context("spawn").Lock()
    names.send((segment.name, semaphore._semlock.name.lstrip("/")))
    time.sleep(1000)

if __name__ == "__main__":
    detach_resource_tracker()
    names, there = get_context("spawn").Pipe()
    get_context("spawn").Process(target=share, args=(there,)).start()
    print(*names.recv(), flush=True)
    time.sleep(1000)
"""


def test_shared_memory_goes_with_a_process_group_that_is_killed(tmp_path: Path) -> None:
    (tmp_path / "share.py").write_text(PROCESS)
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "share.py")], stdout=subprocess.PIPE, text=True, process_group=0
    )
    assert process.stdout is not None
    names = [SHM / "{}{}".format(*pair) for pair in zip(("", "sem."), process.stdout.readline().split(), strict=True)]
    assert names[0].name.startswith("psm_") and all(name.exists() for name in names)
    os.killpg(process.pid, signal.SIGKILL)  # with Python's resource tracker
    process.wait(timeout=60)
    deadline = time.monotonic() + 60
    while left := [name for name in names if name.exists()]:
        assert time.monotonic() < deadline, f"{left} are still there"
        time.sleep(0.05)


def test_a_tracker_that_would_be_killed_is_refused() -> None:
    early = "from multiprocessing import resource_tracker as r; r.ensure_running(); "
    late = "from quatro_ray.actors.shared_memory import detach_resource_tracker as d; d()"
    done = subprocess.run([sys.executable, "-c", early + late], capture_output=True, text=True, timeout=60)
    assert done.stderr.strip().splitlines()[-1].startswith("RuntimeError: the resource tracker runs already")
