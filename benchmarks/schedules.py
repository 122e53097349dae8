"""Schedules of other systems on simulated engines, in virtual time, for benchmarks/simulate.py."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from statistics import mean
from typing import Any, TypeVar

from quatro_ray.simulation.engine import SimulatedEngine
from quatro_ray.simulation.virtual_loop import VirtualLoop
from quatro_ray.simulation.workload import Workload
from quatro_ray.types import Query, SamplingParams

T = TypeVar("T")
_QUERY, _SAMPLING = Query("simulated", "", ""), SamplingParams(1.0, 1.0, 1, 0)


def in_virtual_time(work: Callable[[Callable[[], float]], Coroutine[Any, Any, T]]) -> T:
    """Run `work`, which gets the clock, on a virtual loop."""
    loop = VirtualLoop()
    try:
        return loop.run_until_complete(work(loop.time))
    finally:
        loop.close()


def generation_s(workload: Workload, *, num_engines: int, num_groups: int, group_size: int) -> float:
    """Return the seconds to generate a whole batch and wait for its longest response, as synchronous systems do."""

    async def generate(clock: Callable[[], float]) -> float:
        engines = [_engine(workload) for _ in range(num_engines)]
        await asyncio.gather(*(_generate(engines[i % num_engines], i, group_size) for i in range(num_groups)))
        return clock()

    return in_virtual_time(generate)


@dataclass(frozen=True)
class Window:
    """A trainer that takes groups from a queue and sends weights after several steps (verl's fully asynchronous mode).

    Between two updates at most (1 + `threshold`) · `num_steps` · `groups_per_step` groups are there to be trained:
    those left in the queue, those being generated, and new ones.

    Attributes:
        train_s: seconds of a step.
        sync_s: seconds of a weight update, during which the engines pause.
        groups_per_engine: groups that an engine has at most.
    """

    num_engines: int
    groups_per_step: int
    num_steps: int
    threshold: float
    train_s: float
    sync_s: float
    group_size: int = 16
    groups_per_engine: int = 16


def window_s(workload: Workload, window: Window, *, num_windows: int = 15) -> tuple[float, float]:
    """Return the seconds of a window, and those in which its trainer waited, means without the first third."""

    async def run(clock: Callable[[], float]) -> list[tuple[float, float]]:
        return await _Windows(workload, window, clock).run(num_windows)

    times = in_virtual_time(run)[num_windows // 3 :]
    return mean(whole for whole, _ in times), mean(waited for _, waited in times)


class _Windows:
    def __init__(self, workload: Workload, window: Window, clock: Callable[[], float]) -> None:
        self._window = window
        self._clock = clock
        self._engines = [_engine(workload) for _ in range(window.num_engines)]
        self._loads = [0] * window.num_engines
        self._num_waiting = self._num_allowed = self._num_begun = 0
        self._changed = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self, num_windows: int) -> list[tuple[float, float]]:
        """Return the seconds of each window, and those in which its trainer waited."""
        found = [await self._one() for _ in range(num_windows)]
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        return found

    async def _one(self) -> tuple[float, float]:
        window, begun, waited = self._window, self._clock(), 0.0
        most = int((1 + window.threshold) * window.groups_per_step * window.num_steps)
        self._num_allowed = most - self._num_waiting - sum(self._loads)
        self._begin_groups()
        for _ in range(window.num_steps):
            since = self._clock()
            while self._num_waiting < window.groups_per_step:
                self._changed.clear()
                await self._changed.wait()
            waited += self._clock() - since
            self._num_waiting -= window.groups_per_step
            await asyncio.sleep(window.train_s)
        for engine in self._engines:
            await engine.pause()
        await asyncio.sleep(window.sync_s)
        for engine in self._engines:
            await engine.resume()
        return self._clock() - begun, waited

    def _begin_groups(self) -> None:
        while self._num_allowed > 0 and min(self._loads) < self._window.groups_per_engine:
            self._num_allowed -= 1
            self._num_begun += 1
            index = self._loads.index(min(self._loads))
            self._loads[index] += 1
            task = asyncio.ensure_future(self._generate(index, self._num_begun))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _generate(self, index: int, group_id: int) -> None:
        await _generate(self._engines[index], group_id, self._window.group_size)
        self._loads[index] -= 1
        self._num_waiting += 1
        self._begin_groups()
        self._changed.set()


def _engine(workload: Workload) -> SimulatedEngine:
    engine = SimulatedEngine(workload)
    engine.live()
    return engine


async def _generate(engine: SimulatedEngine, group_id: int, group_size: int) -> None:
    await engine.generate(group_id, _QUERY, _SAMPLING, group_size)
