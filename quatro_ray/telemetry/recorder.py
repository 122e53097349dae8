"""The only writer of a run's records: metrics, rollouts, timeline, events, notes, trackers, the progress line."""

from __future__ import annotations

import json
import logging
import re
import time
from collections import defaultdict
from collections.abc import Callable, Container, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from quatro_ray.telemetry.activity import CONTROLLER, IDLE, Activity, member_name, shares
from quatro_ray.telemetry.append_log import AppendLog, last_lines_of
from quatro_ray.telemetry.console import Progress
from quatro_ray.telemetry.evaluation_result import EvaluationResult
from quatro_ray.telemetry.logs import without_secrets
from quatro_ray.telemetry.record_types import parse
from quatro_ray.telemetry.tracker import Outcome, Tracker
from quatro_ray.types import EngineLoad, StepMetrics

_OF_EVALUATIONS = ("evaluations", "evaluation_rollouts")
_BY_STEP = ("metrics", "rollouts", *_OF_EVALUATIONS)
_SHOWN_EVENTS = {"lost", "recovered", "given_up", "fell_back", "damaged", "failed", "incomplete"}
_WARNING_EVENTS = {"lost", "given_up", "damaged", "failed", "incomplete"}
_FIRST_FIELD = re.compile(rb'\{"step": (\d+)[,}]')
TIMELINE = "timeline.jsonl"
_MAX_TIMELINE_BYTES = 2**26
_MAX_DRAWN = 16
"""Members of a role that the timeline has; it would grow by a gigabyte an hour with 1,024 engines."""

_logger = logging.getLogger(__name__)
# Without any handler Python prints warnings on stderr, and the terminal has them from the progress line already.
_logger.addHandler(logging.NullHandler())


class Recorder:
    """Writes everything that a run records. Times are in seconds since the run began, earlier parts of it included.

    Files are opened in append mode, so a resumed run continues them.

    Args:
        run_dir: where the files are written.
        num_steps: optimiser steps of the whole run, for the progress line.
        progress: the terminal.
        clock: returns seconds that only increase.

    Attributes:
        roles: what the members of each role do.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        num_steps: int,
        progress: Progress,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._num_steps = num_steps
        self._progress = progress
        self._by_step = {name: AppendLog(run_dir / f"{name}.jsonl") for name in _BY_STEP}
        self._timeline = AppendLog(run_dir / TIMELINE, max_bytes=_MAX_TIMELINE_BYTES)
        self._events = AppendLog(run_dir / "events.jsonl")
        self._notes = AppendLog(run_dir / "notes.log")
        self._is_full = False
        self._clock = clock
        self._start = clock() - _last_time(run_dir)
        self._trackers: list[Tracker] = []
        self._on_event: list[Callable[[str, str], None]] = []
        self.roles: dict[str, Activity] = {}
        self._phases: defaultdict[str, list[str]] = defaultdict(list)
        for role in (CONTROLLER, "learner"):
            self.watch(role, Activity(clock))

    def now(self) -> float:
        """Return the seconds since the run began; a resumed run continues from the last time in its timeline."""
        return self._clock() - self._start

    @contextmanager
    def phase(self, role: str, name: str) -> Iterator[None]:
        """Record that `role`, which has one member, does `name` inside the with block, and is idle outside of it.

        Where two phases overlap, the time counts for the one that began last.
        """
        names, activity = self._phases[role], self.roles[role]
        names.append(name)
        activity.enter(0, name)
        try:
            yield
        finally:
            names.remove(name)
            activity.enter(0, names[-1] if names else IDLE)

    def follow_with(self, tracker: Tracker) -> None:
        """Send metrics, evaluations, checkpoints and fall-backs to a tracker too; its methods must return at once."""
        self._trackers.append(tracker)

    def listen(self, on_event: Callable[[str, str], None]) -> None:
        """Call a function with each event and its part, from now on; it must return at once."""
        self._on_event.append(on_event)

    def watch(self, role: str, activity: Activity) -> None:
        """Add a role. Its shares of time become metrics, and the stays of its first 16 members go to the timeline."""

        def span(member: int, state: str, duration: float) -> None:
            if member < _MAX_DRAWN and state != IDLE:
                end = self.now()
                name = member_name(role, member)
                _write(self._timeline, {"role": name, "phase": state, "start": end - duration, "end": end})

        activity.on_span = span
        self.roles[role] = activity

    def seconds(self) -> dict[str, float]:
        """Return the seconds by phase, of the roles that have one member, and of the whole run."""
        single = {k: s for role in self._phases for k, s in self.roles[role].seconds().items() if k != IDLE}
        return single | {"total": self.now()}

    def time_shares(self) -> dict[str, dict[str, float]]:
        """Return the share of each state in the time of each role since this part of the run began."""
        found = {role: shares(activity.seconds()) for role, activity in self.roles.items() if role != CONTROLLER}
        return {role: states for role, states in found.items() if states}

    def engine_load(self, index: int, load: EngineLoad) -> None:
        """Add what an engine reports about its work to the timeline, if it is one of the first 16."""
        if index < _MAX_DRAWN:
            _write(self._timeline, {"role": f"generator {index}", "t": self.now(), **asdict(load)})

    def event(self, event: str, part: str, **detail: object) -> None:
        """Record what happened to a component in events.jsonl and the notes, and show losses and recoveries.

        Args:
            event: what happened, such as lost, recovered, fell_back or written.
            part: the component, such as `generator 0`.
            detail: further fields of the record.
        """
        detail = {k: without_secrets(v) if isinstance(v, str) else v for k, v in detail.items()}
        _write(self._events, {"time_s": self.now(), "clock_s": time.time(), "event": event, "part": part, **detail})
        for on_event in self._on_event:
            on_event(event, part)
        shown = ", ".join(f"{k} {v}" for k, v in detail.items())
        message = f"{part}: {event.replace('_', ' ')}{f' ({shown})' if shown else ''}"
        self.note(message, level=logging.WARNING if event in _WARNING_EVENTS else logging.INFO)
        if event in _SHOWN_EVENTS:
            self._progress.say(message)

    def rewind(self, step: int, evaluated: Set[int]) -> None:
        """Delete records of later steps and of abandoned evaluations; the resumed run writes them again.

        Args:
            step: the last step whose records stay.
            evaluated: steps whose evaluations stay.
        """
        for name, file in self._by_step.items():
            steps = evaluated if name in _OF_EVALUATIONS else range(step + 1)
            if num_damaged := _keep_steps(file, steps):
                self.event("damaged", f"{name}.jsonl", why=f"{num_damaged} lines cannot be read; they are left out")
        for tracker in self._trackers:
            tracker.on_rewind(step)

    def step(self, step: int, metrics: StepMetrics, samples: Sequence[Mapping[str, object]]) -> None:
        """Record an optimiser step: its metrics, and the sampled groups as rollouts.jsonl has them."""
        shown = {name: _rounded(v) if isinstance(v, list) else v for name, v in metrics.items()}
        _write(self._by_step["metrics"], {"step": step, "time_s": self.now(), **shown})
        for group in samples:
            _write(self._by_step["rollouts"], {"step": step, **group})
        for tracker in self._trackers:
            tracker.on_step(step, shown)
        self._progress.step(step, self._num_steps, metrics, self.now())

    def evaluation(self, result: EvaluationResult) -> None:
        """Record and show the result of one evaluation set."""
        record = result.record()
        _write(self._by_step["evaluations"], {"step": result.step, "time_s": self.now(), **record})
        for group in result.rollouts:
            _write(self._by_step["evaluation_rollouts"], {"step": result.step, "set": result.name, **group})
        for tracker in self._trackers:
            tracker.on_evaluation(result.step, result.name, record)
        self._progress.evaluation(result)

    def checkpoint(self, step: int, version: int, path: Path) -> None:
        """Record that a checkpoint is complete."""
        self.event("written", "checkpoint", step=step, version=version, path=path.name)
        for tracker in self._trackers:
            tracker.on_checkpoint(step, str(path))

    def note(self, message: str, *, level: int = logging.INFO) -> None:
        """Write a line, with secrets masked, to notes.log and to Python's logging."""
        message = without_secrets(message)
        self._notes.write(f"{self.now():.1f} s  {message}")
        _logger.log(level, "%s", message)
        self._warn_if_disk_became_full()

    def _warn_if_disk_became_full(self) -> None:
        was_full, self._is_full = self._is_full, self._notes.num_waiting > 0
        if self._is_full and not was_full:
            self._warn("the disk of run.dir is full: records wait in memory until there is space")

    def _warn(self, message: str) -> None:
        """Show a message that notes.log cannot take."""
        _logger.warning("%s", message)
        self._progress.say(message)

    def say(self, message: str, *, level: int = logging.INFO) -> None:
        """Show a message on the terminal, and note it."""
        self.note(message, level=level)
        self._progress.say(message)

    def close(self, outcome: Outcome = "finished") -> None:
        """Write what waits and close all files. Records for which the disk has no space are counted and reported."""
        for activity in self.roles.values():
            activity.close()
        for tracker in self._trackers:
            tracker.on_end(outcome)  # may still say something
        files = [self._timeline, self._events, self._notes, *self._by_step.values()]
        for file in files:
            file.close()
        if lost := sum(file.num_dropped + file.num_waiting for file in files):
            self._warn(f"{lost} records could not be written: the disk of run.dir is full")
        self._progress.close()


def _keep_steps(file: AppendLog, steps: Container[int]) -> int:
    """Delete the records of other steps, and lines that cannot be read; return the number of the latter."""
    num_damaged = 0

    def is_kept(line: bytes) -> bool:
        nonlocal num_damaged
        step = _step(line)
        num_damaged += step is None
        return step in steps

    file.keep(is_kept)
    return num_damaged


def _step(line: bytes) -> int | None:
    """Return the step of a record by its first field, so that long lines are not parsed; None if it has none."""
    found = _FIRST_FIELD.match(line)
    return int(found[1]) if found else None


def _last_time(run_dir: Path) -> float:
    """Return the time of the last line in the timeline of an earlier part of the run, in seconds; 0 if none."""
    for line in last_lines_of(run_dir / TIMELINE):
        record = parse(TIMELINE, line)
        if record is not None:  # else it is damaged, and the line before it is as good
            return float(record["end"] if "end" in record else record["t"])
    return 0.0


def _rounded(values: list[float]) -> list[float]:
    """Round to six significant digits; distributions have hundreds of values a step."""
    return [float(f"{v:.6g}") if isinstance(v, float) else v for v in values]


def _write(file: AppendLog, record: Mapping[str, object]) -> None:
    file.write(json.dumps(record))
