"""A pool of equivalent actors: the least loaded one gets the work, and an actor that dies or hangs is replaced."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError, RayTaskError

from quatro_ray.actors.calls import ACTOR_DIED, value_of
from quatro_ray.telemetry.activity import IDLE, Activity
from quatro_ray.timeouts import within


class ActorPool:
    """A pool of a fixed number of actors.

    Args:
        spawn: makes a new actor, which has a method `start`.
        start_deadline_s: limit for the start of one actor.
    """

    def __init__(self, spawn: Callable[[], ActorHandle], num_actors: int, start_deadline_s: float) -> None:
        self._spawn = spawn
        self._start_deadline_s = start_deadline_s
        self.actors = [spawn() for _ in range(num_actors)]
        self._starting: dict[ActorHandle, asyncio.Task[None]] = {}
        self._loads = dict.fromkeys(self.actors, 0)
        self._numbers = {actor: i for i, actor in enumerate(self.actors)}
        self.activity = Activity()
        self.num_replaced = 0
        for actor in self.actors:
            self.activity.enter(self._numbers[actor], IDLE)

    @asynccontextmanager
    async def least_loaded(self) -> AsyncIterator[ActorHandle]:
        """Yield a running actor; it is replaced if it dies, or if a TimeoutError is raised, inside the `async with`.

        Raises:
            TimeoutError: a new actor did not start in time; it is replaced too.
            RayError: a new actor did not start; it is replaced too.
        """
        actor = min(self._loads, key=self._loads.__getitem__)
        self._count(actor, 1)
        try:
            await self._started(actor)
            yield actor
        except (TimeoutError, *ACTOR_DIED) as error:
            # a RayTaskError reports the death of another actor, which this one called
            if not isinstance(error, RayTaskError):
                self.replace(actor)
            raise
        finally:
            if actor in self._loads:
                self._count(actor, -1)

    def _count(self, actor: ActorHandle, change: int) -> None:
        self._loads[actor] += change
        self.activity.enter(self._numbers[actor], "busy" if self._loads[actor] else IDLE)

    async def _started(self, actor: ActorHandle) -> None:
        """Wait until the actor runs. Its start is requested once, and does not count against its work's deadline."""
        if actor not in self._starting:
            self._starting[actor] = asyncio.create_task(self._start(actor))
        try:
            # shield: a caller that is cancelled must not cancel the start for the others
            await asyncio.shield(self._starting[actor])
        except (TimeoutError, RayError):
            self.replace(actor)
            raise

    async def _start(self, actor: ActorHandle) -> None:
        await within(self._start_deadline_s, value_of(actor.start.remote()))

    def replace(self, actor: ActorHandle) -> None:
        """Kill the actor and spawn another one in its place; do nothing if it was replaced already."""
        if actor not in self._loads:
            return  # another caller that used it was faster
        ray.kill(actor)
        self.actors.remove(actor)
        del self._loads[actor]
        self._starting.pop(actor, None)
        self.num_replaced += 1
        new = self._spawn()
        self.actors.append(new)
        self._loads[new] = 0
        self._numbers[new] = self._numbers.pop(actor)
        self.activity.enter(self._numbers[new], IDLE)
