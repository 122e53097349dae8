"""An engine's actor as a plain async object: what the controller and its tests see.

Summaries are awaited; groups stay references that go from actor to actor.
"""

from __future__ import annotations

from collections.abc import Awaitable, Mapping
from typing import Any, TypeVar

import ray
from ray.exceptions import RayTaskError

from quatro_ray.actors.calls import ACTOR_DIED, value_of, value_or_cancel
from quatro_ray.errors import last_line
from quatro_ray.failures import EngineDied, EngineLost
from quatro_ray.types import EngineLoad, GenerationSummary, Query, Rollout, SamplingParams

T = TypeVar("T")


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
    ) -> tuple[GenerationSummary, Any]:
        """A summary, and a reference to the group. `begun`: what another engine has sampled of it; not of episodes,
        which begin again."""
        if environment := self._environments.get(query.source):
            try:
                return await _alive(environment.play(self.actor, group_id, query, sampling, group_size))
            except EngineLost as lost:  # what it has of a turn is no beginning of a group
                raise EngineLost(str(lost), core_died=lost.core_died) from lost
        summary, group = self.actor.generate.remote(group_id, query, sampling, group_size, begun)
        return await _alive(value_or_cancel(summary)), group

    async def load(self) -> EngineLoad:
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
        """With the engine's processes, which die with the actor's (weight_sync/vllm_plugin.py)."""
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
