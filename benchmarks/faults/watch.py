"""Observes a fault from injection to recovery: time to detect, time to recover, and the cost."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import Any

import psutil

from benchmarks.faults.audit import compare
from benchmarks.faults.kinds import Blow, Kind
from benchmarks.faults.processes import describe, is_alive
from benchmarks.faults.run import Run
from quatro_ray.replay.ledger_reader import LedgerRows

_LOOK_EVERY_S = 0.2
_UNDO_AFTER_S = 120.0
_UNDER_WAY = "pending"


@dataclass
class Outcome:
    """The outcome of one fault. Seconds count from the injection; None: not within the deadline.

    Attributes:
        requeued: groups that went back a stage, as events and the ledger say.
        lost: number of groups, see audit.compare, from before the fault to the recovery.
        duplicated: likewise.
        dropped: groups dropped meanwhile, by reason.
        ends: how drivers ended, with their last words; those that were not to end are in `problems` too.
        orphans: processes that outlived their driver by 30 s.
    """

    kind: str
    run: int
    step: int
    at: float
    victim: str
    detail: str
    detected_s: float | None = None
    recovered_s: float | None = None
    why: str = ""
    requeued: int = 0
    lost: int = 0
    duplicated: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    ends: list[str] = field(default_factory=list)
    orphans: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def record(self) -> dict[str, Any]:
        return asdict(self)


class Watch:
    """Observes one fault until the run has recovered.

    Args:
        run: the run.
        kind: the kind of fault.
        blow: the fault.
        before: the ledger just before the fault.
        outcome: is filled in.
    """

    def __init__(self, run: Run, kind: Kind, blow: Blow, before: LedgerRows, outcome: Outcome) -> None:
        self._run = run
        self._kind = kind
        self._blow = blow
        self._before = before
        self._outcome = outcome
        self._missing = set(kind.then)
        self._mark: float | None = None
        """Time of the newest step when the fault was detected; a later step means recovery."""

    def until_recovered(self, deadline_s: float, restart_s: float) -> Outcome:
        """Observe, and start drivers again that end; a driver that must be started gets `restart_s` more."""
        deadline = self._blow.at + deadline_s + (restart_s if self._kind.statuses else 0.0)
        while time.time() < deadline and not self._is_over():
            if self._run.status() is not None and not self._run.is_done():
                self._ended()
                self._run.start()
                deadline = max(deadline, time.time() + restart_s)
            self._undo_in_time()
            time.sleep(_LOOK_EVERY_S)
        self._undo()
        self._settle()
        return self._outcome

    def _is_over(self) -> bool:
        for event in self._run.look():
            self._take(event)
        if self._kind.is_noticed_at_once:
            self._detected(self._blow.at)
        elif self._outcome.detected_s is None and not self._kind.signs and not self._kind.statuses:
            self._look_for_successor()
        has_continued = self._has_continued() and not self._missing and self._run.is_steady()
        if has_continued or self._run.is_done():
            self._outcome.recovered_s = self._since(time.time())
        return self._outcome.recovered_s is not None

    def _has_continued(self) -> bool:
        """Return whether a step was made since the fault was detected."""
        return self._mark is not None and self._run.steps.newest_s > self._mark

    def _take(self, event: dict[str, Any]) -> None:
        if event["clock_s"] < self._blow.at:
            return
        if any(sign.is_in(event) for sign in self._kind.signs):
            self._outcome.why = self._outcome.why or str(event.get("why", ""))[:300]
            self._detected(event["clock_s"])
        self._missing = {sign for sign in self._missing if not sign.is_in(event)}
        if event["event"] == "lost":
            self._outcome.requeued += event.get("groups", 0)
        elif event["event"] == "fell_back":
            self._outcome.requeued += event["ready"] + event["pending"]
        elif event["event"] == "given_up":
            self._outcome.problems.append(f"{event['part']} was given up: {event.get('why', '')}")

    def _look_for_successor(self) -> None:
        if is_alive(self._blow.victim):
            return
        if {p.pid for p in self._run.process(self._kind.role)} - self._blow.peers:
            self._detected(time.time())

    def _detected(self, at: float) -> None:
        if self._outcome.detected_s is None:
            self._outcome.detected_s = self._since(at)
            self._mark = self._run.steps.newest_s
            self._undo()

    def _ended(self) -> None:
        """Handle the end of the driver before the run was done."""
        status, words = self._run.status(), self._run.last_words()
        self._outcome.ends.append(f"{status}: {words}")
        first = len(self._outcome.ends) == 1
        expected = self._kind.statuses == "error" or (self._kind.statuses and status in self._kind.statuses)
        if not (first and expected):
            self._outcome.problems.append(f"the driver ended with status {status}: {words}")
        elif why := self._kind.check(self._run, self._blow):
            self._outcome.problems.append(why)
        if self._kind.statuses:
            self._detected(time.time())
        self._outcome.orphans += self._run.clean_up()
        if not self._kind.restores_ledger:  # the ledger is damaged now
            self._outcome.requeued += sum(g.state == _UNDER_WAY for g in self._run.snapshot().groups)

    def _undo_in_time(self) -> None:
        if time.time() - self._blow.at > _UNDO_AFTER_S:
            self._undo()

    def _undo(self) -> None:
        if self._blow.undo is not None:
            self._blow.undo()
            self._blow.undo = None

    def _settle(self) -> None:
        """Record the cost, and whether the victim is still there."""
        if self._kind.restores_ledger:  # numbers of versions before it mean others now
            self._run.snapshots.clear()
            self._before = self._run.snapshot()
        outcome, after = self._outcome, self._run.snapshot()
        lost, duplicated = compare(self._before, after)
        outcome.lost, outcome.duplicated = len(lost), len(duplicated)
        there = {g.group_id for g in self._before.groups if g.state == "dropped"}
        for group in after.groups:
            if group.state == "dropped" and group.group_id not in there and group.reason != "run_ended":
                outcome.dropped[str(group.reason)] = outcome.dropped.get(str(group.reason), 0) + 1
        if outcome.detected_s is None and not self._run.is_done():
            outcome.problems.append("not noticed")
        if outcome.recovered_s is None:
            outcome.problems.append(f"not recovered; step {self._run.steps.step}, down: {sorted(self._run.down)}")
        if is_alive(self._blow.victim) and self._is_stopped(self._blow.victim):
            outcome.problems.append(f"what was stopped is still there: {describe([self._blow.victim])}")
            self._blow.victim.kill()

    def _is_stopped(self, process: psutil.Process) -> bool:
        return process.status() == psutil.STATUS_STOPPED

    def _since(self, at: float) -> float:
        return round(at - self._blow.at, 2)
