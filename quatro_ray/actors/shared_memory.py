"""Checks that there is shared memory, and removes an engine's even if it is killed with all its processes."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from multiprocessing import resource_tracker

from quatro_ray.errors import ConfigError

_SHARED_MEMORY = "/dev/shm"
_NEEDED_MIB = 512

_TRACKER = '"$PYTHON" -B -c "from multiprocessing.resource_tracker import main; main($FD)" </dev/null >/dev/null 2>&1 &'


def check_shared_memory(what: str) -> None:
    """Check that processes of this machine can exchange tensors; a container has 64 MiB for that by default.

    Args:
        what: that which needs it, as the beginning of a sentence.

    Raises:
        ConfigError: there is too little.
    """
    free = shutil.disk_usage(_SHARED_MEMORY).free >> 20
    if free < _NEEDED_MIB:
        raise ConfigError(
            f"{what} need {_NEEDED_MIB} MiB of shared memory, and {_SHARED_MEMORY} on {socket.gethostname()} has "
            f"{free} MiB free: start the container with --shm-size=8g (Kubernetes: mount an emptyDir of medium Memory "
            "there), or delete what earlier programs have left in it"
        )


def detach_resource_tracker() -> None:
    """Start Python's resource tracker as a process that survives this one. Call it before anything is shared.

    The tracker learns of each segment and semaphore of this process and of the processes that it spawns, and removes
    them when all these processes have ended. Ray kills a worker with its process group and its children, and thus also
    a tracker that Python starts. This one has a session of its own and no parent.

    Raises:
        RuntimeError: a tracker is running already.
    """
    tracker = resource_tracker._resource_tracker
    if tracker._fd is not None:  # type: ignore[attr-defined]
        raise RuntimeError("the resource tracker runs already, as a child that is killed with this process")
    read, write = os.pipe()
    environment = os.environ | {"PYTHON": sys.executable, "FD": str(read)}
    shell = subprocess.Popen(["sh", "-c", _TRACKER], env=environment, pass_fds=(read,), start_new_session=True)
    shell.wait(timeout=10)  # the tracker, which the shell started in the background, keeps running
    os.close(read)
    tracker._fd = write  # type: ignore[attr-defined]
