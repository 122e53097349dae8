"""Passes what a run records to its trackers and callbacks, so that none of them can stop or delay training."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from threading import Thread
from typing import Any

from quatro_ray.config import Config
from quatro_ray.telemetry.recorder import Recorder
from quatro_ray.telemetry.tracker import Outcome, TrackedRun, Tracker
from quatro_ray.trackers.process import TrackerProcess
from quatro_ray.trackers.public_config import public_config
from quatro_ray.trackers.run_ids import RunIds

_STOPPED_DEADLINE_S = 5.0
"""Limit for the end after a signal, since a scheduler waits little longer than a checkpoint takes."""
_KILL_DEADLINE_S = 30.0


class TrackerProcesses(Tracker):
    """Passes each call to the process of every tracker and callback, and returns at once.

    One thread writes to all processes, which end with it (isolation/protocol.py:die_with_parent).

    Args:
        config: the resolved configuration.
        recorder: for failures, and what trackers print.
    """

    def __init__(self, config: Config, recorder: Recorder) -> None:
        telemetry, run_dir = config.telemetry, config.run.dir
        self._deadline_s = telemetry.tracker_deadline_s
        run = TrackedRun(telemetry.project, telemetry.run_name or run_dir.name, run_dir, public_config(config))
        ids = RunIds(run_dir, recorder)
        self._loop = asyncio.new_event_loop()
        self._processes = [
            TrackerProcess(name, kind, run, ids, self._loop, recorder, self._deadline_s)
            for kind, names in (("tracker", telemetry.trackers), ("callback", telemetry.callbacks))
            for name in names
        ]
        self._thread = Thread(target=self._serve, name="trackers", daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve_all())

    async def _serve_all(self) -> None:
        ends = await asyncio.gather(*(process.serve() for process in self._processes), return_exceptions=True)
        for error in ends:
            if isinstance(error, Exception):  # not the cancellation by `stop`
                raise error

    def on_step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Pass the metrics on."""
        self._send("on_step", step, dict(metrics))

    def on_evaluation(self, step: int, name: str, result: Mapping[str, Any]) -> None:
        """Pass the result on."""
        self._send("on_evaluation", step, name, dict(result))

    def on_checkpoint(self, step: int, path: str) -> None:
        """Pass the path on."""
        self._send("on_checkpoint", step, path)

    def on_rewind(self, step: int) -> None:
        """Pass the step on."""
        self._send("on_rewind", step)

    def _send(self, hook: str, *arguments: Any) -> None:
        for process in self._processes:
            process.send(hook, arguments)

    def on_end(self, outcome: Outcome) -> None:
        """Let all trackers end the run at the same time, within the deadline, and kill those that are left then."""
        deadline_s = min(self._deadline_s, _STOPPED_DEADLINE_S) if outcome == "stopped" else self._deadline_s
        for process in self._processes:
            process.end(outcome)
        self._thread.join(deadline_s)
        if self._thread.is_alive():
            for process in self._processes:
                process.stop(f"it did not end within {deadline_s:g} s")
            self._thread.join(_KILL_DEADLINE_S)
        for process in self._processes:
            process.report()
