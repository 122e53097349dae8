"""CPU time of a command and of all that it starts, also of daemons that are no children of it any more."""

from __future__ import annotations

import os
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import psutil

_MARK = "BENCHMARK_PROCESS_TREE"
_POLL_S = 0.2


class Moment(NamedTuple):
    """Seconds since the command began, of time and of CPU."""

    time: float
    cpu: float


class ProcessTree:
    """The processes that inherited a mark in their environment. What one does after the last poll is lost."""

    def __init__(self) -> None:
        self.mark = uuid.uuid4().hex
        self._seconds: dict[tuple[int, float], float] = {}
        self._is_ours: dict[tuple[int, float], bool] = {}

    def processes(self) -> Iterator[psutil.Process]:
        """Yield those that run."""
        for process in psutil.process_iter():
            key = (process.pid, process.create_time())
            if not self._is_ours.get(key):
                with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                    self._is_ours[key] = process.environ().get(_MARK) == self.mark
            if self._is_ours.get(key):
                yield process

    def cpu_seconds(self) -> float:
        """Return the CPU time so far of all processes, ended ones included."""
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                self._seconds[process.pid, process.create_time()] = times.user + times.system
        return sum(self._seconds.values())

    def kill(self) -> None:
        """End what is left."""
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)


def watch_lines(
    command: Sequence[str],
    lines_of: Path,
    log: Path,
    *,
    env: Mapping[str, str],
    deadline_s: float,
    at_each_look: Callable[[ProcessTree], None] = lambda _: None,
    look_every_s: float = _POLL_S,
) -> list[Moment]:
    """Run a command, and return when each line of a file that it writes appeared.

    Args:
        command: what to run; its output goes to `log`.
        lines_of: the file, which is deleted before.
        log: where the output goes.
        env: added to the environment.
        deadline_s: seconds after which it is killed.
        at_each_look: called at each look at all processes.
        look_every_s: seconds between two looks; 0.2 s take 3 % of a core. Between them, processes may end unseen.

    Raises:
        RuntimeError: the command failed, or did not end in time.
    """
    lines_of.unlink(missing_ok=True)
    tree = ProcessTree()
    moments: list[Moment] = []
    begun = looked = time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=os.environ | dict(env) | {_MARK: tree.mark}
        )
        try:
            while process.poll() is None and time.monotonic() - begun < deadline_s:
                found = lines_of.read_bytes().count(b"\n") if lines_of.exists() else 0
                if found > len(moments):
                    now = Moment(time.monotonic() - begun, tree.cpu_seconds())
                    moments += [now] * (found - len(moments))
                if time.monotonic() - looked >= look_every_s:
                    looked = time.monotonic()
                    tree.cpu_seconds()
                    at_each_look(tree)
                time.sleep(_POLL_S)
        finally:
            process.terminate()
            try:
                process.wait(timeout=60)
            finally:
                tree.kill()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with status {process.returncode}; see {log}")
    return moments
