"""Wakes every task that is waiting on the learner when the learner dies."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import TypeVar

from quatro_ray.actors.interfaces import Learner
from quatro_ray.failures import LearnerLost
from quatro_ray.timeouts import Overtaken, unless

T = TypeVar("T")
_LOOK_EVERY_S = 0.1


class LearnerMonitor:
    """Watches the learner for the whole run.

    Args:
        liveness_deadline_s: after this many seconds without an answer, a rank counts as dead.
        on_death: called at each death.
    """

    def __init__(self, learner: Learner, liveness_deadline_s: float, on_death: Callable[[], None]) -> None:
        self._learner = learner
        self._liveness_deadline_s = liveness_deadline_s
        self._on_death = on_death
        self._died = asyncio.Event()
        self._why = ""

    async def loop(self) -> None:
        """Watch the ranks; after a death, wait for `restarted`."""
        while True:
            self._why = await self._learner.watch(self._liveness_deadline_s)
            self._died.set()
            self._on_death()
            while self._died.is_set():
                await asyncio.sleep(_LOOK_EVERY_S)

    def restarted(self) -> None:
        """Start watching again, after all ranks were restarted."""
        self._died.clear()

    def check(self) -> None:
        """Raise LearnerLost if the learner is dead."""
        if self._died.is_set():
            raise LearnerLost(self._why)

    async def during(self, work: Coroutine[object, object, T]) -> T:
        """Run `work`, or cancel it and raise LearnerLost if the learner dies first."""
        try:
            return await unless(self._died, work)
        except Overtaken as error:
            raise LearnerLost(self._why) from error
