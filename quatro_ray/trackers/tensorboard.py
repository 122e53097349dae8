"""TensorBoard's event files."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from quatro_ray.telemetry.tracker import Outcome, TrackedRun, Tracker, evaluation_scalars, step_scalars


class TensorBoard(Tracker):
    """Writes scalars to tensorboard/ in the run directory, without importing torch.

    A resumed run adds a file. After a fall-back TensorBoard shows only the steps that were made again.
    """

    def __init__(self) -> None:
        self._dir = ""
        self._writer: Any = None

    def on_start(self, run: TrackedRun) -> None:
        """Choose the folder; the first event creates the file."""
        self._dir = str(run.dir / "tensorboard")

    def on_step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Write the numbers among the metrics."""
        self._write_scalars(step_scalars(metrics), step)

    def on_evaluation(self, step: int, name: str, result: Mapping[str, Any]) -> None:
        """Write the rates of the evaluation set."""
        self._write_scalars(evaluation_scalars(name, result), step)

    def on_rewind(self, step: int) -> None:
        """Tell readers of the file to discard all scalars after this step."""
        self._write(Event(wall_time=time.time(), step=step + 1, session_log=SessionLog(status=SessionLog.START)))

    def on_end(self, outcome: Outcome) -> None:
        """Close the file."""
        if self._writer is not None:
            self._writer.close()

    def _write_scalars(self, scalars: Mapping[str, float], step: int) -> None:
        values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        self._write(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))

    def _write(self, event: Any) -> None:
        """Write an event to the disk. After an error the next event begins a new file: the writer's thread has ended.

        Raises:
            OSError: the event cannot be written.
        """
        if self._writer is None:
            self._writer = EventFileWriter(self._dir)
        try:
            self._writer.add_event(event)
            self._writer.flush()
        except OSError:
            self._writer = None
            raise
