"""Removes an engine's shared memory even if the engine is killed with all its processes."""

from __future__ import annotations

import os
import subprocess
import sys
from multiprocessing import resource_tracker

_TRACKER = '"$PYTHON" -B -c "from multiprocessing.resource_tracker import main; main($FD)" </dev/null >/dev/null 2>&1 &'


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
