"""The order and time of faults: seeded, all kinds in turn, each only while the run is healthy."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

from benchmarks.faults.kinds import Kind
from benchmarks.faults.run import Run
from benchmarks.faults.watch import Outcome, Watch

_START_S = 300.0
_RECOVER_S = 180.0
_RESTART_S = 120.0
_CALM_S = (2.0, 8.0)
_MAX_STARTS_IN_A_ROW = 3


class GaveUp(Exception):
    """The run does not start any more, or hangs without a fault."""


class Schedule:
    """Injects faults into runs until the time or the number of faults is used up.

    Args:
        kinds: kinds of faults.
        seed: of the order, the victims and the pauses.
        minutes: no fault begins later than this after the first one; None: there is no such limit.
        max_faults: number of faults.
        log: file that gets a line when a fault begins and when it is over.
        say: shows a message to people.
    """

    def __init__(
        self,
        kinds: Sequence[Kind],
        seed: int,
        minutes: float | None,
        max_faults: int,
        log: Path,
        say: Callable[[str], None],
    ) -> None:
        self._kinds = list(kinds)
        self._rng = Random(seed)
        self._minutes = minutes
        self._first_at: float | None = None
        self._max_faults = max_faults
        self._log = log
        self._say = say
        self._queue: list[Kind] = []
        self.outcomes: list[Outcome] = []

    def is_over(self) -> bool:
        """Return whether no further fault is to be injected; the minutes begin with the first fault."""
        if len(self.outcomes) >= self._max_faults:
            return True
        if self._minutes is None or self._first_at is None:
            return False
        return time.monotonic() - self._first_at >= 60 * self._minutes

    def play(self, run: Run, index: int, last_step: int) -> None:
        """Inject faults until the run is done.

        Args:
            last_step: no fault is begun after it.

        Raises:
            GaveUp: it ended or hung repeatedly without a fault.
        """
        run.start()
        while not run.is_done():
            if not self._is_well(run):
                continue
            if self.is_over() or run.steps.step > last_step:
                self._let_end(run)
                continue
            self._calm(run)
            if run.status() is None and run.steps.step <= last_step:
                self._one(run, index)

    def _is_well(self, run: Run) -> bool:
        """Wait until the run is healthy; a driver that ends or hangs is started again."""
        for _ in range(_MAX_STARTS_IN_A_ROW):
            deadline = time.monotonic() + _START_S
            while time.monotonic() < deadline and run.status() is None:
                run.look()
                if run.is_steady():
                    return True
                time.sleep(0.2)
            if run.is_done():
                return False
            self._start_again(run, f"step {run.steps.step}, down: {sorted(run.down)}")
        raise GaveUp(f"{run.dir}: {_MAX_STARTS_IN_A_ROW} drivers in a row did not come to make a step; {run.folder}")

    def _start_again(self, run: Run, why: str) -> None:
        status = run.status()
        what = "hangs" if status is None else f"ended with status {status} ({run.last_words()})"
        self._say(f"the driver {what} without a new fault: {why}; it is started again")
        self._write({"unprovoked": what, "why": why, "at": time.time()})
        if status is None:
            run.close()
        run.clean_up()
        run.start()

    def _let_end(self, run: Run) -> None:
        """Wait without faults until the driver ends, or start it again if it makes no step for long."""
        newest, since = run.steps.newest_s, time.monotonic()
        while run.status() is None:
            run.look()
            if run.steps.newest_s > newest:
                newest, since = run.steps.newest_s, time.monotonic()
            if time.monotonic() - since > _START_S:
                return self._start_again(run, "no step")
            time.sleep(0.2)

    def _calm(self, run: Run) -> None:
        until = time.monotonic() + self._rng.uniform(*_CALM_S)
        while time.monotonic() < until and run.status() is None:
            run.look()
            time.sleep(0.2)

    def _one(self, run: Run, index: int) -> None:
        """Inject the next kind that can be injected, if any can."""
        if not self._queue:
            self._queue = self._rng.sample(self._kinds, len(self._kinds))
        before = run.snapshot()
        for kind in self._queue:
            step = run.steps.step
            if (blow := kind.inject(run, self._rng)) is None:
                run.look()
                if run.is_steady():
                    continue
                return  # it struck partly, or another fault did
            self._queue.remove(kind)
            self._first_at = self._first_at or time.monotonic()
            outcome = Outcome(kind.name, index, step, blow.at, blow.name, blow.detail)
            self._write({"injected": kind.name, "run": index, "step": step, "at": blow.at, "victim": blow.name})
            Watch(run, kind, blow, before, outcome).until_recovered(_RECOVER_S, _RESTART_S)
            self.outcomes.append(outcome)
            self._write(outcome.record())
            self._tell(outcome)
            if outcome.recovered_s is None and outcome.detected_s is not None:
                self._start_again(run, f"not recovered from: {kind.name}")
            return

    def _tell(self, outcome: Outcome) -> None:
        text = f"{outcome.kind}: noticed in {outcome.detected_s} s, recovered in {outcome.recovered_s} s"
        self._say(text + "".join(f"; {problem}" for problem in [*outcome.problems, *outcome.orphans]))

    def _write(self, record: dict[str, object]) -> None:
        with self._log.open("a") as log:
            log.write(json.dumps(record) + "\n")
