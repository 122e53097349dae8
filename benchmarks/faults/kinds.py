"""The kinds of faults: the victim, the injection, the events that show detection, and what must follow."""

from __future__ import annotations

import os
import resource
import signal
import sqlite3
import statistics
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import psutil

from benchmarks.faults import hostile_reward
from benchmarks.faults.processes import Role, describe, strike
from benchmarks.faults.records import Lines, read_lines
from benchmarks.faults.run import Run
from quatro_ray.replay.schema import damage_of

_SIGKILL, _SIGSTOP, _SIGTERM = signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM
_LOADING_BYTES = 2**30
PREEMPTED = 128 + signal.SIGTERM
_LOCKED_S = 10.0
_FAILED_START_S = 120.0
_TRIGGERED_S = 60.0


@dataclass
class Blow:
    """An injected fault. `at`: seconds since the epoch; `peers`: ids of all processes with the victim's role then."""

    victim: psutil.Process
    name: str
    peers: set[int]
    at: float = field(default_factory=time.time)
    detail: str = ""
    undo: Callable[[], None] | None = None
    """Called when the fault was detected, or when the time for that is over."""


@dataclass(frozen=True)
class Sign:
    """An event of events.jsonl. `part`: prefix of the component's name; `why`: text that the reason contains."""

    event: str
    part: str
    why: str = ""

    def is_in(self, event: dict[str, Any]) -> bool:
        named = event["event"] == self.event and event["part"].startswith(self.part)
        return named and self.why in str(event.get("why", ""))


@dataclass(frozen=True)
class Kind:
    """A kind of fault.

    Attributes:
        name: as `--kinds` takes it.
        role: of the victim.
        strike: injects the fault; false if the right moment did not come.
        signs: any of these events shows that it was detected. Empty: the victim is gone and has a successor.
        statuses: exit statuses of the driver that show detection; "error": any except 0.
        then: events that must all follow before the run counts as recovered.
        is_ready: whether the fault can be injected now.
        check: returns what was wrong with the way the driver ended, or an empty text.
        is_noticed_at_once: nothing shows that it was detected; the run is to go on as if nothing had happened.
        restores_ledger: the ledger becomes that of a checkpoint, and later versions are issued again.
    """

    name: str
    role: Role
    strike: Callable[[Run, Blow, Random], bool]
    signs: tuple[Sign, ...] = ()
    statuses: tuple[int, ...] | str = ()
    then: tuple[Sign, ...] = ()
    is_ready: Callable[[Run], bool] = lambda run: True
    check: Callable[[Run, Blow], str] = lambda run, blow: ""
    is_noticed_at_once: bool = False
    restores_ledger: bool = False

    def inject(self, run: Run, rng: Random) -> Blow | None:
        """Inject the fault; return None if there is no victim, or if it escaped."""
        peers = run.process(self.role)
        if not peers or not self.is_ready(run):
            return None
        victim = rng.choice(peers)
        blow = Blow(victim, describe([victim])[0], {p.pid for p in peers})
        return blow if self.strike(run, blow, rng) else None


def _signal(number: signal.Signals) -> Callable[[Run, Blow, Random], bool]:
    def send(run: Run, blow: Blow, rng: Random) -> bool:
        blow.at = time.time()
        return strike(blow.victim, number)

    return send


def _signal_all(number: signal.Signals) -> Callable[[Run, Blow, Random], bool]:
    """Send a signal to the driver's process group, as a terminal does."""

    def send(run: Run, blow: Blow, rng: Random) -> bool:
        blow.at = time.time()
        os.killpg(blow.victim.pid, number)
        return True

    return send


def _out_of_memory(run: Run, blow: Blow, rng: Random) -> bool:
    return _limit(blow)


def _out_of_memory_at_start(run: Run, blow: Blow, rng: Random) -> bool:
    """Kill an engine core, and deny its successor further address space while it loads.

    A core that has loaded asks for no more memory: under such a limit it kept running for minutes.
    """
    strike(blow.victim, _SIGKILL)
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and run.status() is None:
        for process in run.process(Role.ENGINE):
            if process.pid not in blow.peers and _used(process) > _LOADING_BYTES:
                blow.victim, blow.name = process, describe([process])[0]
                return _limit(blow)
        time.sleep(0.05)
    return False


def _used(process: psutil.Process) -> int:
    try:
        return process.memory_info().vms
    except psutil.Error:
        return 0


def _limit(blow: Blow) -> bool:
    """Make all further requests for address space fail, even if some was given back before."""
    victim = blow.victim
    try:
        before, used = victim.rlimit(resource.RLIMIT_AS), victim.memory_info().vms
        victim.rlimit(resource.RLIMIT_AS, (used // 2, before[1]))
    except psutil.Error:
        return False
    blow.at, blow.detail = time.time(), f"{used / 2**20:.0f} MiB in use"
    blow.undo = lambda: _limit_again(victim, before)
    return True


def _limit_again(victim: psutil.Process, limit: tuple[int, int]) -> None:
    try:
        victim.rlimit(resource.RLIMIT_AS, limit)
    except psutil.Error:
        return  # the limit killed it


def _within_update(run: Run, blow: Blow, rng: Random) -> bool:
    """Strike within the next weight update, which follows the training phase of each step."""
    phases = [p for p in read_lines(run.dir / "timeline.jsonl") if p.get("phase") == "sync"][-20:]
    length = statistics.median([p["end"] - p["start"] for p in phases] or [0.3])
    timeline = Lines(run.dir / "timeline.jsonl")
    timeline.new()
    pair, into = rng.random() < 0.5, rng.uniform(0, length)
    deadline = time.monotonic() + 60
    while not any(line.get("phase") == "train" for line in timeline.new()):
        if time.monotonic() > deadline or run.status() is not None:
            return False
        time.sleep(0.005)
    time.sleep(into)
    blow.at, blow.detail = time.time(), f"{into:.2f} s after training, updates last {length:.2f} s"
    if pair and strike(blow.victim, _SIGSTOP):
        blow.detail += ", stopped for 2 s, then killed"
        time.sleep(2)
    return strike(blow.victim, _SIGKILL)


def _damage(how: Callable[[Path, Random], str]) -> Callable[[Run, Blow, Random], bool]:
    """Damage the newest checkpoint, then kill its reader, so that the restart has to detect the damage."""

    def send(run: Run, blow: Blow, rng: Random) -> bool:
        newest, *_ = run.newest_checkpoints()
        file = rng.choice(sorted(newest.glob("*.pt")))
        blow.detail = f"{newest.name}/{file.name}: {how(file, rng)}"
        blow.at = time.time()
        return strike(blow.victim, _SIGKILL)

    return send


def _truncate(file: Path, rng: Random) -> str:
    size = rng.randrange(file.stat().st_size)
    with file.open("r+b") as opened:
        opened.truncate(size)
    return f"cut to {size:,} bytes"


def _flip(file: Path, rng: Random) -> str:
    position, bit = rng.randrange(file.stat().st_size), rng.randrange(8)
    with file.open("r+b") as opened:
        opened.seek(position)
        byte = opened.read(1)[0]
        opened.seek(position)
        opened.write(bytes([byte ^ 1 << bit]))
    return f"bit {bit} of byte {position:,} flipped"


def _flip_ledger(run: Run, blow: Blow, rng: Random) -> bool:
    """Kill the driver, and damage the ledger once all its processes have ended."""
    blow.at = time.time()
    if not strike(blow.victim, _SIGKILL):
        return False
    run.clean_up()
    ledger = run.dir / "ledger.sqlite"
    with closing(sqlite3.connect(ledger)) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    while damage_of(ledger) is None:  # some bytes are not in use
        blow.detail = _flip(ledger, rng)
    return True


def _lock_ledger(run: Run, blow: Blow, rng: Random) -> bool:
    with closing(sqlite3.connect(run.dir / "ledger.sqlite", isolation_level=None, timeout=10)) as db:
        db.execute("BEGIN IMMEDIATE")
        time.sleep(_LOCKED_S)
        db.execute("COMMIT")
    blow.at, blow.detail = time.time(), f"locked for {_LOCKED_S:g} s"
    return True


def _start_on_full_disk(run: Run, blow: Blow, rng: Random) -> bool:
    """Kill the driver, and start another one while the disk of run.dir is full, which must refuse and lose nothing."""
    assert run.home is not None
    strike(blow.victim, _SIGKILL)
    run.clean_up()
    before = (run.dir / "config.yaml").read_bytes()
    run.home.fill(leave_bytes=0)
    try:
        run.start()
        deadline = time.monotonic() + _FAILED_START_S
        while run.status() is None and time.monotonic() < deadline:
            time.sleep(0.2)
    finally:
        run.home.free()
    blow.at = time.time()
    same = (run.dir / "config.yaml").read_bytes() == before
    blow.detail = run.last_words() if same else "config.yaml has changed"
    return True


def _check_refused(run: Run, blow: Blow) -> str:
    return "" if "No space left" in blow.detail else blow.detail


def _trigger(what: str) -> Callable[[Run, Blow, Random], bool]:
    """Let the hostile reward misbehave in the process that scores the next response."""

    def send(run: Run, blow: Blow, rng: Random) -> bool:
        peers = {p.pid: p for p in run.process(Role.WORKER)}
        done = run.trigger.with_suffix(".pid")
        done.unlink(missing_ok=True)
        blow.at = time.time()
        run.trigger.write_text(what)
        deadline = time.monotonic() + _TRIGGERED_S
        while not (done.exists() and done.read_text()):
            if time.monotonic() > deadline or run.status() is not None:
                return False
            time.sleep(0.02)
        pid = int(done.read_text())
        if pid not in peers:
            return False  # a process that began meanwhile
        blow.victim, blow.name, blow.peers = peers[pid], f"{pid} {what}", set(peers)
        return True

    return send


def _fill_disk(run: Run, blow: Blow, rng: Random) -> bool:
    assert run.disk is not None
    size = sum(p.stat().st_size for p in run.newest_checkpoints()[0].iterdir())
    blow.at = time.time()
    free = run.disk.fill(leave_bytes=rng.choice([0, size // 2]))
    blow.detail, blow.undo = f"{free:,} bytes left, a checkpoint takes {size:,}", run.disk.free
    return True


def _has_checkpoints(number: int) -> Callable[[Run], bool]:
    return lambda run: len(run.newest_checkpoints()) >= number


def _check_preempted(run: Run, blow: Blow) -> str:
    step, took = run.steps.step, time.time() - blow.at
    is_there = (run.checkpoints / f"step_{step}").is_dir()
    return "" if is_there else f"step {step} has no checkpoint ({took:.0f} s after the signal)"


_NOT_STARTED = (Sign("lost", "generator", "did not start"),)
_ENGINE = (Sign("lost", "generator"),)
_LEARNER = (Sign("lost", "learner"),)
_DAMAGED = (Sign("damaged", "checkpoint"),)
_FAILED, _WRITTEN = (Sign("failed", "checkpoint"),), (Sign("written", "checkpoint"),)

DISK_FULL, CONFIG_ON_FULL_DISK = "disk full", "start on a full disk"

KINDS: tuple[Kind, ...] = (
    Kind("generator actor killed", Role.GENERATOR, _signal(_SIGKILL), _ENGINE),
    Kind("generator actor stopped", Role.GENERATOR, _signal(_SIGSTOP), _ENGINE),
    Kind("engine core killed", Role.ENGINE, _signal(_SIGKILL), _ENGINE),
    Kind("engine core stopped", Role.ENGINE, _signal(_SIGSTOP), _ENGINE),
    Kind("generator actor out of memory", Role.GENERATOR, _out_of_memory, _ENGINE),
    Kind("engine core out of memory", Role.ENGINE, _out_of_memory_at_start, _NOT_STARTED),
    Kind("learner rank killed", Role.LEARNER, _signal(_SIGKILL), _LEARNER),
    Kind("learner rank stopped", Role.LEARNER, _signal(_SIGSTOP), _LEARNER),
    Kind("replay killed", Role.REPLAY, _signal(_SIGKILL)),
    Kind("replay stopped", Role.REPLAY, _signal(_SIGSTOP)),
    Kind("verifier actor killed", Role.VERIFIER, _signal(_SIGKILL)),
    Kind("verifier worker killed", Role.WORKER, _signal(_SIGKILL)),
    Kind("verifier worker stopped", Role.WORKER, _signal(_SIGSTOP)),
    Kind("controller killed", Role.DRIVER, _signal(_SIGKILL), statuses=(-_SIGKILL,)),
    Kind("preempted", Role.DRIVER, _signal(_SIGTERM), statuses=(PREEMPTED,), check=_check_preempted),
    Kind(
        "interrupted", Role.DRIVER, _signal_all(signal.SIGINT), statuses=(128 + signal.SIGINT,), check=_check_preempted
    ),
    Kind(
        "terminal closed", Role.DRIVER, _signal_all(signal.SIGHUP), statuses=(128 + signal.SIGHUP,),
        check=_check_preempted,
    ),
    Kind("node killed", Role.RAYLET, _signal(_SIGKILL), statuses="error"),
    Kind("weight update, engine killed", Role.ENGINE, _within_update, _ENGINE),
    Kind("weight update, learner killed", Role.LEARNER, _within_update, _LEARNER),
    Kind(
        "checkpoint truncated, learner killed", Role.LEARNER, _damage(_truncate), _DAMAGED,
        is_ready=_has_checkpoints(2),
    ),
    Kind(
        "checkpoint flipped, controller killed", Role.DRIVER, _damage(_flip), statuses=(-_SIGKILL,), then=_DAMAGED,
        is_ready=_has_checkpoints(2),
    ),
    Kind("ledger locked", Role.REPLAY, _lock_ledger, is_noticed_at_once=True),
    Kind(
        "ledger flipped, controller killed", Role.DRIVER, _flip_ledger, statuses=(-_SIGKILL,),
        then=(Sign("restored", "ledger"),), is_ready=_has_checkpoints(1), restores_ledger=True,
    ),
    Kind("reward forks", Role.WORKER, _trigger(hostile_reward.FORKS), is_noticed_at_once=True),
    Kind("reward forges a reply", Role.WORKER, _trigger(hostile_reward.FORGES)),
    Kind(CONFIG_ON_FULL_DISK, Role.DRIVER, _start_on_full_disk, statuses=(2,), check=_check_refused),
    Kind(DISK_FULL, Role.DRIVER, _fill_disk, _FAILED, then=_WRITTEN, is_ready=_has_checkpoints(1)),
)  # fmt: skip
"""All kinds; the two with full disks need separate disks."""
