"""The worker processes that a test has started."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil


def workers(module: str) -> list[psutil.Process]:
    """This process's own children that run `module` and live; not theirs, as in a sandbox."""
    return [p for p in _alive(recursive=False) if module in _command(p)]


@contextmanager
def none_left() -> Iterator[None]:
    """Fails where the block leaves a process behind."""
    before = _alive()
    try:
        yield
    finally:
        left = _alive() - before
        assert not left, [_command(p) for p in left]


def _alive(recursive: bool = True) -> set[psutil.Process]:
    """Without zombies: they have ended, only nobody has asked yet; they have no command line."""
    found = set()
    for process in psutil.Process().children(recursive=recursive):
        with suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                found.add(process)
    return found


def _command(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.NoSuchProcess:  # psutil.ZombieProcess is one too: it ended just now
        return []
