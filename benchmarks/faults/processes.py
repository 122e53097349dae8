"""The processes of one run, found by descent and identified by id and start time."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterable
from contextlib import suppress
from enum import StrEnum
from pathlib import Path

import psutil

MARKER = "QUATRO_CHAOS"
_SHM = "/dev/shm/"


class Role(StrEnum):
    """Roles of processes; each value is a part of the command line."""

    GENERATOR = "ray::GeneratorActor"
    ENGINE = "VLLM::EngineCore"
    LEARNER = "ray::LearnerActor"
    REPLAY = "ray::ReplayActor"
    VERIFIER = "ray::VerifierActor"
    WORKER = "quatro_ray.rewards.worker"
    RAYLET = "/raylet/raylet"
    DRIVER = "quatro-ray train"


class Family:
    """All processes that descend from a driver, also those whose parents are gone.

    A process belongs to it if its parent does, or if its environment holds the marker. Ids are kept with the
    start time, so that an id that the system reuses is another process.

    Args:
        marker: value of the variable MARKER in the driver's environment, unlike any other's.
    """

    def __init__(self, marker: str) -> None:
        self._marker = f"{MARKER}={marker}".encode()
        self._known: dict[tuple[int, float], psutil.Process] = {}
        self._strangers: set[tuple[int, float]] = set()
        self.shm: set[str] = set()
        """Names under /dev/shm that a member had mapped when `look_at_memory` was called."""

    def add(self, pid: int) -> None:
        process = psutil.Process(pid)
        self._known[_key(process)] = process

    def look(self) -> list[psutil.Process]:
        """Find new members; return all that are alive, oldest first."""
        pids = {p.pid for p in self.alive()}
        for process in sorted(psutil.process_iter(), key=lambda p: p.pid):
            with suppress(psutil.Error, OSError):
                key = _key(process)
                if key in self._known:
                    continue
                if process.ppid() in pids or self._is_marked(key):
                    self._known[key] = process
                    pids.add(process.pid)
        return self.alive()

    def _is_marked(self, key: tuple[int, float]) -> bool:
        if key in self._strangers:
            return False
        marked = self._marker in Path(f"/proc/{key[0]}/environ").read_bytes().split(b"\0")
        if not marked:
            self._strangers.add(key)
        return marked

    def alive(self) -> list[psutil.Process]:
        return sorted((p for p in self._known.values() if is_alive(p)), key=lambda p: p.create_time())

    def of(self, role: Role) -> list[psutil.Process]:
        """Return the members with a role, without the keeper of each worker: it has the same command line."""
        found = [p for p in self.look() if role in command_of(p)]
        parents = {parent_of(p) for p in found}
        return [p for p in found if p.pid not in parents]

    def look_at_memory(self) -> None:
        """Record which shared memory the members use."""
        self.shm |= _mapped(self.alive())

    def wait_gone(self, seconds: float) -> list[psutil.Process]:
        """Wait after the driver's end; return the members that are still alive after `seconds`."""
        deadline = time.monotonic() + seconds
        while (left := self.look()) and time.monotonic() < deadline:
            time.sleep(0.25)
        return left

    def kill(self) -> None:
        """Kill all members until none is left, and remove the shared memory that they would have removed at exit."""
        deadline, cut_off = time.monotonic() + 30, set[str]()
        while (left := self.look()) and time.monotonic() < deadline:
            cut_off |= _mapped(left)
            for process in left:
                strike(process, signal.SIGKILL)
            time.sleep(0.1)
        remove_shared_memory(cut_off)


def _mapped(processes: Iterable[psutil.Process]) -> set[str]:
    """Return names of mapped shared memory, by inode: the creator of a semaphore maps it under its earlier name."""
    inodes: set[int] = set()
    for process in processes:
        with suppress(OSError):
            lines = Path(f"/proc/{process.pid}/maps").read_text().splitlines()
            inodes.update(int(line.split()[4]) for line in lines if _SHM in line)
    return {file.name for file in os.scandir(_SHM) if file.inode() in inodes}


def _key(process: psutil.Process) -> tuple[int, float]:
    return process.pid, process.create_time()


def is_alive(process: psutil.Process) -> bool:
    """Return whether a process is alive; a zombie holds nothing and is not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def parent_of(process: psutil.Process) -> int | None:
    try:
        return int(process.ppid())
    except psutil.Error:
        return None


def command_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def strike(process: psutil.Process, number: signal.Signals) -> bool:
    """Send a signal; false if the process is gone. psutil compares the start time before it sends."""
    try:
        process.send_signal(number)
    except psutil.Error:
        return False
    return True


def shared_memory() -> set[str]:
    """Return the names of all shared memory segments on this machine."""
    return set(os.listdir(_SHM))


def remove_shared_memory(names: Iterable[str]) -> None:
    for name in names:
        (Path(_SHM) / name).unlink(missing_ok=True)


def describe(processes: Iterable[psutil.Process]) -> list[str]:
    return [f"{p.pid} {command_of(p)[:120].strip()}" for p in processes]
