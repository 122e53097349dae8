"""One tracker or callback in a process of its own: what waits for it, what failed, and when it is given up."""

from __future__ import annotations

import asyncio
import os
import resource
import sys
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from quatro_ray.errors import ConfigError
from quatro_ray.isolation import keeper
from quatro_ray.isolation.protocol import Message
from quatro_ray.isolation.worker_pool import Launch, Worker, WorkerLost
from quatro_ray.telemetry.logs import without_secrets
from quatro_ray.telemetry.recorder import Recorder
from quatro_ray.telemetry.tracker import Outcome, TrackedRun
from quatro_ray.trackers.registry import HOOKS
from quatro_ray.trackers.run_ids import RunIds

_PROGRAM = "quatro_ray.trackers.worker"
_MAX_WAITING = 1000
"""Calls that wait for a tracker, each with the metrics of a step, which may have hundreds of values."""
_RECORDS = frozenset(HOOKS) - {"on_start", "on_end"}
_MAX_FAILURES = 10
"""Failed calls in a row after which a tracker is given up."""


class CallFailed(Exception):
    """The tracker's method raised; the text says which, and what and where."""


class TrackerProcess:
    """The process of one tracker or callback.

    `send`, `end`, `stop` and `report` are called by the run's thread and return at once. The event loop, in another
    thread, runs `serve`, which does the rest.

    Args:
        name: of the tracker, or the import path of a callback.
        kind: "tracker" or "callback", for messages.
        run: what `on_start` gets, without the id.
        ids: ids of the run in all trackers.
        loop: the event loop that runs `serve`.
        recorder: for failures, and what the tracker prints.
        deadline_s: limit for the process's start and for each call, in seconds.
    """

    def __init__(
        self,
        name: str,
        kind: str,
        run: TrackedRun,
        ids: RunIds,
        loop: asyncio.AbstractEventLoop,
        recorder: Recorder,
        deadline_s: float,
    ) -> None:
        self._name = name
        self._part = f"{kind} {name}"
        self._run = run
        self._ids = ids
        self._loop = loop
        self._recorder = recorder
        self._deadline_s = deadline_s
        self._waiting: deque[tuple[str, Sequence[Any]]] = deque()
        self._arrived = asyncio.Event()
        self._worker: Worker | None = None
        self._task: asyncio.Task[None] | None = None
        self._is_given_up = False
        self._has_failed = False
        self._num_refused, self._num_failed, self._num_failed_in_a_row = 0, 0, 0

    # In the run's thread

    def send(self, hook: str, arguments: Sequence[Any]) -> None:
        """Let a method be called later, or count the call as lost if too many wait or the tracker was given up.

        Args:
            hook: the name of the method.
            arguments: JSON values.
        """
        if self._is_given_up or len(self._waiting) >= _MAX_WAITING:
            self._num_refused += 1
            if self._num_refused == 1 and not self._is_given_up:
                why = f"{_MAX_WAITING} records wait for it; more are lost until it takes some"
                self._recorder.event("failed", self._part, why=why)
        else:
            self._put(hook, arguments)

    def end(self, outcome: Outcome) -> None:
        """Let the tracker end the run after all that waits."""
        self._put("on_end", (outcome,))

    def _put(self, hook: str, arguments: Sequence[Any]) -> None:
        self._waiting.append((hook, arguments))
        self._in_loop(self._arrived.set)

    def stop(self, why: str) -> None:
        """Kill the process unless it has ended; what waits for it is lost."""
        self._in_loop(self._stop, why)

    def _in_loop(self, function: Any, *arguments: Any) -> None:
        with suppress(RuntimeError):  # the loop is closed, because every tracker has ended or was given up
            self._loop.call_soon_threadsafe(function, *arguments)

    def report(self) -> None:
        """Say how many records were lost, if any; called after the end."""
        num_waiting = sum(hook in _RECORDS for hook, _ in self._waiting)
        if num_lost := self._num_refused + self._num_failed + num_waiting:
            self._recorder.event("incomplete", self._part, lost_records=num_lost)

    # In the thread of the event loop

    async def serve(self) -> None:
        """Make the calls one after the other, until the run ends or the tracker is given up."""
        self._task = asyncio.current_task()
        try:
            await self._handle("on_start", ())
            while not self._is_given_up:
                self._arrived.clear()
                while self._waiting and not self._is_given_up:
                    hook, arguments = self._waiting[0]
                    await self._handle(hook, arguments)
                    self._waiting.popleft()  # only now: `stop` may end the call, and `report` counts what waits
                    if hook == "on_end":
                        return
                if not self._is_given_up:
                    await self._arrived.wait()
        finally:
            self._is_given_up = True
            if self._worker is not None:
                await self._worker.kill()

    def _stop(self, why: str) -> None:
        assert self._task is not None
        if not self._task.done():
            self._recorder.event("given_up", self._part, why=why)
            self._task.cancel()

    async def _handle(self, hook: str, arguments: Sequence[Any]) -> None:
        """Make one call, in a new process if there is none; count it if it fails."""
        try:
            if self._worker is None:
                if hook == "on_end":  # there is nothing to end
                    return
                self._worker = await self._start()
            if hook != "on_start":
                await self._call(self._worker, hook, arguments)
            self._num_failed_in_a_row = 0
        except CallFailed as error:
            self._failed(hook, str(error))
        except (WorkerLost, ConfigError, OSError) as error:
            self._worker = None
            self._failed(hook, f"{hook}: {error}")

    async def _start(self) -> Worker:
        """Start a process and the run in it.

        Raises:
            CallFailed: `on_start` raised.
            ConfigError: the tracker cannot be made.
            WorkerLost: the process ended or missed the deadline.
        """
        argv = keeper.command(_PROGRAM, "-P")
        hello = {"tracker": self._name, "memory_bytes": resource.getrlimit(resource.RLIMIT_AS)[1]}
        worker = await Worker.start(Launch(argv, env=_environment(), is_kept=True), hello, self._deadline_s)
        run = vars(self._run) | {"dir": str(self._run.dir), "id": self._ids.get(self._name)}
        try:
            answer = await self._call(worker, "on_start", (run,))
        except BaseException:
            await worker.kill()
            raise
        if answer["id"] is not None:
            self._ids.put(self._name, answer["id"])
        if answer["place"]:
            self._recorder.say(without_secrets(f"{self._part}: {answer['place']}"))
        return worker

    async def _call(self, worker: Worker, hook: str, arguments: Sequence[Any]) -> Message:
        answer = await worker.ask({"hook": hook, "arguments": list(arguments)}, self._deadline_s)
        if answer.get("printed"):
            self._recorder.note(f"{self._part} printed: {answer['printed']}")
        if "error" in answer:
            raise CallFailed(answer["error"])
        return answer

    def _failed(self, hook: str, why: str) -> None:
        self._num_failed += hook in _RECORDS
        self._num_failed_in_a_row += 1
        if self._num_failed_in_a_row >= _MAX_FAILURES:
            self._is_given_up = True
            why = f"{_MAX_FAILURES} calls in a row failed; the last: {why}"
            self._recorder.event("given_up", self._part, why=why)
        elif not self._has_failed:
            self._recorder.event("failed", self._part, why=why)
        else:  # the terminal has had the first one
            self._recorder.note(f"{self._part}: failed ({why})")
        self._has_failed = True


def _environment() -> dict[str, str]:
    """Return this process's environment, where clients find accounts and servers, without Ray's variables."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return own | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
