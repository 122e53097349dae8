"""Who waits for something that only a living learner can bring hears here of its death."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from quatro_ray.failures import LearnerLost
from quatro_ray.timeouts import Overtaken, unless

T = TypeVar("T")
_LOOK_EVERY_S = 0.1


class LearnerMonitor:
    """
    Args:
        learner: actors/learner_group.py: LearnerGroup.
        on_death: called at each death.
    """

    def __init__(self, learner: Any, liveness_deadline_s: float, on_death: Callable[[], None]) -> None:
        self._learner = learner
        self._liveness_deadline_s = liveness_deadline_s
        self._on_death = on_death
        self._died = asyncio.Event()
        self._why = ""

    async def loop(self) -> None:
        """Watches the ranks for ever; after a death it waits for `restarted`."""
        while True:
            self._why = await self._learner.watch(self._liveness_deadline_s)
            self._died.set()
            self._on_death()
            while self._died.is_set():
                await asyncio.sleep(_LOOK_EVERY_S)

    def restarted(self) -> None:
        self._died.clear()

    def check(self) -> None:
        """Raises LearnerLost where it is dead."""
        if self._died.is_set():
            raise LearnerLost(self._why)

    async def during(self, work: Coroutine[Any, Any, T]) -> T:
        """Raises LearnerLost, with the work cancelled, where the learner dies first."""
        try:
            return await unless(self._died, work)
        except Overtaken as error:
            raise LearnerLost(self._why) from error
