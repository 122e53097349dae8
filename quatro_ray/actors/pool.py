"""Actors that do the same: the least loaded one takes the work; one that dies or does not answer is replaced."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from quatro_ray.actors.calls import ACTOR_DIED, value_of
from quatro_ray.timeouts import within


class ActorPool:
    """
    Args:
        spawn: makes a new actor (a handle) that has a method `start`.
    """

    def __init__(self, spawn: Callable[[], Any], num_actors: int, start_deadline_s: float) -> None:
        self._spawn = spawn
        self._start_deadline_s = start_deadline_s
        self.actors = [spawn() for _ in range(num_actors)]
        self._starting: dict[Any, asyncio.Task[None]] = {}
        self._loads = dict.fromkeys(self.actors, 0)
        self.num_replaced = 0

    @asynccontextmanager
    async def least_loaded(self) -> AsyncIterator[Any]:
        """An actor that runs. A TimeoutError or the actor's death inside of the `async with` replaces it.

        Raises:
            TimeoutError, RayError: one that is new does not start; it is replaced too.
        """
        actor = min(self._loads, key=self._loads.__getitem__)
        self._loads[actor] += 1
        try:
            await self._started(actor)
            yield actor
        except (TimeoutError, *ACTOR_DIED) as error:
            if not isinstance(error, RayTaskError):  # that would be another actor's death, told by this one
                self.replace(actor)
            raise
        finally:
            if actor in self._loads:
                self._loads[actor] -= 1

    async def _started(self, actor: Any) -> None:
        """Its start does not count against its work. Many may wait; one asks."""
        if actor not in self._starting:
            self._starting[actor] = asyncio.create_task(self._start(actor))
        try:
            await asyncio.shield(self._starting[actor])
        except (TimeoutError, RayError):
            self.replace(actor)
            raise

    async def _start(self, actor: Any) -> None:
        await within(self._start_deadline_s, value_of(actor.start.remote()))

    def replace(self, actor: Any) -> None:
        if actor not in self._loads:
            return  # someone else who had it was faster
        ray.kill(actor)
        self.actors.remove(actor)
        del self._loads[actor]
        self._starting.pop(actor, None)
        self.num_replaced += 1
        new = self._spawn()
        self.actors.append(new)
        self._loads[new] = 0
