"""Peak memory of a process tree."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import psutil


def peak_rss_bytes() -> int:
    """Return the sum of the peak resident sets of this process and its living descendants, in bytes."""
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return sum(_high_water(p.pid) for p in processes)


def _high_water(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:  # it ended between listing and reading
        return 0
    for line in status.splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def own_peak_rss_bytes() -> int:
    """Return the peak resident set of this process alone, in bytes."""
    return _high_water(os.getpid())


def collect_rarely() -> None:
    """Make Python's garbage collector look at few objects.

    For processes that hold many objects for long, such as groups and tasks: by default each 700 new objects are looked
    at, and those that stay again and again. What exists when this is called is never looked at again.
    """
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)
