"""No shared memory stays behind when an engine is killed with all its processes."""

from __future__ import annotations

import os
import subprocess
import sys
from multiprocessing import resource_tracker

_TRACKER = '"$PYTHON" -B -c "from multiprocessing.resource_tracker import main; main($FD)" </dev/null >/dev/null 2>&1 &'


def detach_resource_tracker() -> None:
    """Starts Python's resource tracker where nobody kills it with us; before anything is shared.

    The tracker is told of each segment and semaphore of this process and of those that it spawns, and removes them when
    all of these are gone. Ray kills a worker with its process group and its children, and so the tracker that Python
    would start; this one has a session of its own and no parent.

    Raises:
        RuntimeError: there is a tracker already.
    """
    tracker = resource_tracker._resource_tracker
    if tracker._fd is not None:  # type: ignore[attr-defined]
        raise RuntimeError("the resource tracker runs already, as a child that is killed with this process")
    read, write = os.pipe()
    environment = os.environ | {"PYTHON": sys.executable, "FD": str(read)}
    shell = subprocess.Popen(["sh", "-c", _TRACKER], env=environment, pass_fds=(read,), start_new_session=True)
    shell.wait(timeout=10)  # what it started in the background lives on
    os.close(read)
    tracker._fd = write  # type: ignore[attr-defined]
