"""The only writer of a run's records: metrics, rollouts, timeline, notes, TensorBoard, the progress line."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from quatro_ray.telemetry.append_log import AppendLog
from quatro_ray.telemetry.console import Progress
from quatro_ray.types import EvaluationResult


class Recorder:
    """Times are seconds since the run began. Files are added to: a run that goes on goes on in them."""

    def __init__(self, run_dir: Path, *, num_steps: int, tensorboard: bool, progress: Progress) -> None:
        self._num_steps = num_steps
        self._progress = progress
        self._by_step = {name: AppendLog(run_dir / f"{name}.jsonl") for name in _BY_STEP}
        self._timeline = AppendLog(run_dir / "timeline.jsonl")
        self._events = AppendLog(run_dir / "events.jsonl")
        self._notes = AppendLog(run_dir / "notes.log")
        self._is_full = False
        self._start = time.monotonic() - _last_time(run_dir / "timeline.jsonl")
        self._board = _tensorboard(run_dir / "tensorboard", self.say) if tensorboard else None
        self._step = 0
        self.seconds: defaultdict[str, float] = defaultdict(float)
        """By phase."""

    def now(self) -> float:
        return time.monotonic() - self._start

    @contextmanager
    def phase(self, role: str, name: str) -> Iterator[None]:
        """A stretch of time in which `role` does `name`; phases of one role do not overlap."""
        start = self.now()
        try:
            yield
        finally:
            end = self.now()
            self.seconds[name] += end - start
            _write(self._timeline, {"role": role, "phase": name, "start": start, "end": end})

    def engine_load(self, index: int, load: Mapping[str, int]) -> None:
        _write(self._timeline, {"role": f"generator {index}", "t": self.now(), **load})

    def event(self, event: str, part: str, **detail: Any) -> None:
        """What happened to a part of the run: events.jsonl, the notes, and, if it is bad news, the terminal."""
        _write(self._events, {"time_s": self.now(), "clock_s": time.time(), "event": event, "part": part, **detail})
        shown = ", ".join(f"{k} {v}" for k, v in detail.items())
        (self.say if event in _TOLD else self.note)(
            f"{part}: {event.replace('_', ' ')}{f' ({shown})' if shown else ''}"
        )

    def rewind(self, step: int, evaluated: Set[int]) -> None:
        """What was recorded of steps after this one, and of evaluations of other steps, is taken back: it is made
        again, otherwise."""
        for name, file in self._by_step.items():
            if name in _OF_EVALUATIONS:
                file.keep(lambda line: _step(line) in evaluated)
            else:
                file.keep(lambda line: _step(line) <= step)
        if self._board is not None:
            self._board.restart(step + 1)

    def step(self, step: int, metrics: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> None:
        self._step = step
        shown = {name: _rounded(v) if isinstance(v, list) else v for name, v in metrics.items()}
        _write(self._by_step["metrics"], {"step": step, "time_s": self.now(), **shown})
        for group in samples:
            _write(self._by_step["rollouts"], {"step": step, **group})
        if self._board is not None:
            for name, value in metrics.items():
                if isinstance(value, int | float):
                    self._board.add_scalar(name, value, step)
        self._progress.step(step, self._num_steps, metrics, self.now())

    def evaluation(self, result: EvaluationResult) -> None:
        record = result.record()
        _write(self._by_step["evaluations"], {"step": result.step, "time_s": self.now(), **record})
        for group in result.rollouts:
            _write(self._by_step["evaluation_rollouts"], {"step": result.step, "set": result.name, **group})
        if self._board is not None:
            for name, value in record.items():
                if isinstance(value, float):
                    self._board.add_scalar(f"eval/{result.name}/{name}", value, result.step)
        self._progress.evaluation(result)

    def note(self, message: str) -> None:
        self._notes.write(f"{self.now():.1f} s  {message}")
        self._tell_of_a_full_disk()

    def _tell_of_a_full_disk(self) -> None:
        """Once each time."""
        was_full, self._is_full = self._is_full, self._notes.num_waiting > 0
        if self._is_full and not was_full:
            self._progress.say("the disk of run.dir is full: records wait in memory until there is room")

    def say(self, message: str) -> None:
        """On the terminal and in the notes."""
        self.note(message)
        self._progress.say(message)

    def close(self) -> None:
        if self._board is not None:
            self._board.close()  # which may have something to say
        files = [self._timeline, self._events, self._notes, *self._by_step.values()]
        for file in files:
            file.close()
        if lost := sum(file.num_dropped + file.num_waiting for file in files):
            self._progress.say(f"{lost} records could not be written: the disk of run.dir is full")
        self._progress.close()


_OF_EVALUATIONS = ("evaluations", "evaluation_rollouts")
_BY_STEP = ("metrics", "rollouts", *_OF_EVALUATIONS)
_TOLD = {"lost", "recovered", "given_up", "fell_back", "damaged", "failed"}


def _step(line: bytes) -> int:
    return int(json.loads(line)["step"])


def _last_time(timeline: Path) -> float:
    """Seconds that an earlier part of the run recorded last; 0 where there is none."""
    if not timeline.is_file():
        return 0.0
    lines = [json.loads(line) for line in timeline.read_text(encoding="utf-8").splitlines()]
    return max((line.get("end", line.get("t", 0.0)) for line in lines), default=0.0)


def _rounded(values: list[Any]) -> list[Any]:
    """Distributions have hundreds of values a step: six digits are enough for them."""
    return [float(f"{v:.6g}") if isinstance(v, float) else v for v in values]


def _write(file: AppendLog, record: Mapping[str, Any]) -> None:
    file.write(json.dumps(record))


def _tensorboard(path: Path, say: Callable[[str], None]) -> Any:
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    return _Board(EventFileWriter(str(path)), Summary, say)


class _Board:
    """Scalars for TensorBoard without torch in the controller's process; they end where its disk is full."""

    def __init__(self, writer: Any, summary_type: Any, say: Callable[[str], None]) -> None:
        self._writer = writer
        self._summary = summary_type
        self._say = say

    def add_scalar(self, name: str, value: float, step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        summary = self._summary(value=[self._summary.Value(tag=name, simple_value=float(value))])
        self._add(Event(wall_time=time.time(), step=step, summary=summary))

    def restart(self, step: int) -> None:
        """Tells readers to forget what they have from this step on."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        log = SessionLog(status=SessionLog.START)
        self._add(Event(wall_time=time.time(), step=step, session_log=log))

    def _add(self, event: Any) -> None:
        self._while_it_writes(lambda: self._writer.add_event(event))

    def close(self) -> None:
        self._while_it_writes(lambda: self._writer.close())

    def _while_it_writes(self, action: Callable[[], None]) -> None:
        """TensorBoard's thread ends at its first error, and every later call raises it."""
        if self._writer is None:
            return
        try:
            action()
        except OSError as error:
            self._writer = None
            self._say(f"nothing more for TensorBoard: {error}")
