"""Actor handles as plain async objects: what the controller and its tests see.

Summaries are awaited; groups stay references that go from actor to actor.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

import ray
from ray.exceptions import ActorUnschedulableError, OutOfMemoryError, RayActorError, RayTaskError

from quatro_ray.deadlines import within
from quatro_ray.engines.generation import EngineDied
from quatro_ray.errors import DiskFull, StallError, last_line
from quatro_ray.types import DropReason, Query, Rollout, SamplingParams

T = TypeVar("T")
ACTOR_DIED = (RayActorError, OutOfMemoryError, ActorUnschedulableError)
"""What Ray raises where an actor is gone; OutOfMemoryError where its memory monitor killed it."""


async def value_of(ref: Any) -> Any:
    """An object reference as a coroutine, which is what asyncio's deadlines take."""
    return await ref


async def value_or_cancel(ref: Any) -> Any:
    """Like `value_of`; where the wait is cancelled, past its deadline, the work is too."""
    try:
        return await ref
    except asyncio.CancelledError:
        ray.cancel(ref)
        raise


class GenerationFailed(Exception):
    """One try; after the last one the group is to be dropped for `reason`."""

    def __init__(self, reason: DropReason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


class EngineLost(Exception):
    """The engine or its actor is gone; what it was doing is to be done by another.

    `core_died`: its actor lives, and tells of the other groups as well; `begun`: the rollouts of the group under way,
    as far as they came.
    """

    def __init__(self, message: str, begun: tuple[Rollout, ...] = (), *, core_died: bool = False) -> None:
        super().__init__(message)
        self.begun, self.core_died = begun, core_died


class GeneratorClient:
    """Every method raises EngineLost where actor or engine died.

    `environments`: pools (actors/environment_pool.py) by the name of the source whose rollouts are episodes.
    """

    def __init__(self, actor: Any, environments: Mapping[str, Any] | None = None) -> None:
        self.actor = actor
        self._environments = environments or {}

    async def start(self) -> None:
        await _alive(value_of(self.actor.start.remote()))

    async def generate(
        self,
        group_id: int,
        query: Query,
        sampling: SamplingParams,
        group_size: int,
        begun: tuple[Rollout, ...] = (),
    ) -> tuple[dict[str, int], Any]:
        """A summary, and a reference to the group. `begun`: what another engine has sampled of it; not of episodes,
        which begin again."""
        if environment := self._environments.get(query.source):
            try:
                return await _alive(environment.play(self.actor, group_id, query, sampling, group_size))
            except EngineLost as lost:  # what it has of a turn is no beginning of a group
                raise EngineLost(str(lost), core_died=lost.core_died) from lost
        summary, group = self.actor.generate.remote(group_id, query, sampling, group_size, begun)
        return await _alive(value_or_cancel(summary)), group

    async def load(self) -> dict[str, Any]:
        return await _alive(value_of(self.actor.load.remote()))

    async def pause(self) -> int:
        return await _alive(value_of(self.actor.pause.remote()))

    async def resume(self) -> None:
        await _alive(value_of(self.actor.resume.remote()))

    async def policy_version(self) -> int:
        return await _alive(value_of(self.actor.policy_version.remote()))

    async def stacks(self) -> str:
        return await _alive(value_of(self.actor.stacks.remote()))

    def kill(self) -> None:
        """With the engine's processes, which die with the actor's (weight_sync/plugin.py)."""
        ray.kill(self.actor)


async def _alive(work: Awaitable[T]) -> T:
    try:
        return await work
    except ACTOR_DIED as error:  # also one that an environment's actor met when it asked the engine
        raise EngineLost(last_line(error)) from error
    except RayTaskError as error:
        if isinstance(error.cause, EngineDied):
            raise EngineLost(str(error.cause), error.cause.begun, core_died=True) from error
        raise


class ReplayClient:
    """An actor that dies is started again by Ray, which repeats what was under way; one that hangs is killed first.

    Every call raises StallError when the replay actor does not answer, tries included.
    """

    _TRIES = 3

    def __init__(self, actor: Any, deadline_s: float) -> None:
        self._actor = actor
        self._deadline_s = deadline_s

    async def recover(self) -> dict[str, Any]:
        return await self._call("recover")

    async def pending(self) -> list[tuple[int, Query]]:
        return await self._call("pending")

    async def capacity(self, version: int, num_idle: int = 0) -> int:
        return await self._call("capacity", version, num_idle)

    async def admit(self, first_id: int, queries: list[Query], version: int) -> list[int]:
        return await self._call("admit", first_id, queries, version)

    async def start(self, group_id: int) -> None:
        await self._call("start", group_id)

    async def generated(self, group_id: int) -> None:
        await self._call("generated", group_id)

    async def retry(self, group_id: int) -> None:
        await self._call("retry", group_id)

    async def ready(self, group: Any) -> None:
        await self._call("ready", group)

    async def drop(self, group_id: int, reason: DropReason) -> None:
        await self._call("drop", group_id, reason)

    async def lease(self, version: int, num_samples: int) -> tuple[dict[str, Any] | None, Any]:
        """A summary, and a reference to what the learner needs."""
        return await self._try(lambda: self._actor.lease.remote(version, num_samples))

    async def commit(self, version: int) -> int:
        return await self._call("commit", version)

    async def fall_back(self, version: int, known: int) -> Any:
        return await self._call("fall_back", version, known)

    async def flush(self) -> None:
        await self._call("flush")

    async def absorbed(self, version: int) -> int:
        return await self._call("absorbed", version)

    async def end_run(self) -> None:
        await self._call("end_run")

    async def stats(self) -> dict[str, Any]:
        return await self._call("stats")

    async def _call(self, method: str, *args: Any) -> Any:
        return (await self._try(lambda: (getattr(self._actor, method).remote(*args), None)))[0]

    async def _try(self, call: Callable[[], tuple[Any, Any]]) -> tuple[Any, Any]:
        """`call` gives two references: the value of the first, and the second as it is."""
        for _ in range(self._TRIES):
            answer, rest = call()
            try:
                return await within(self._deadline_s, value_of(answer)), rest
            except TimeoutError:
                self._restart()
            except RayTaskError as error:
                if not isinstance(error.cause, DiskFull):
                    raise
                await asyncio.sleep(self._deadline_s)  # someone may make room
        raise self._stalled()

    def _restart(self) -> None:
        ray.kill(self._actor, no_restart=False)

    def _stalled(self) -> StallError:
        return StallError(
            f"the replay buffer did not answer within replay.deadline_s={self._deadline_s:g} s, {self._TRIES} times, "
            "though it was started again: is the disk of run.dir full or gone?"
        )
