"""A generator actor as a plain async object, the Engine of actors/interfaces.py.

Summaries are awaited; groups stay references, which are passed from actor to actor.
"""

from __future__ import annotations

from collections.abc import Awaitable, Mapping
from typing import Any, TypeVar

import ray
from ray.exceptions import RayTaskError

from quatro_ray.actors.calls import ACTOR_DIED, value_of, value_or_cancel
from quatro_ray.errors import last_line
from quatro_ray.failures import EngineDied, EngineLost
from quatro_ray.types import EngineLoad, GenerationSummary, Installed, Query, Rollout, SamplingParams

T = TypeVar("T")


class GeneratorClient:
    """One engine. Every method raises EngineLost if the engine or its actor died.

    Args:
        actor: a GeneratorActor.
        environments: pools of environments, by the name of each data source whose rollouts are episodes.
    """

    def __init__(self, actor: Any, environments: Mapping[str, Any] | None = None) -> None:
        self.actor = actor
        self._environments = environments or {}

    async def start(self) -> None:
        """Load the starting policy, as version 0."""
        await _alive(value_of(self.actor.start.remote()))

    async def generate(
        self,
        group_id: int,
        query: Query,
        sampling: SamplingParams,
        group_size: int,
        begun: tuple[Rollout, ...] = (),
    ) -> tuple[GenerationSummary, Any]:
        """Return the summary of a group, and a reference to the group; episodes ignore `begun` and start again."""
        if environment := self._environments.get(query.source):
            try:
                return await _alive(environment.play(self.actor, group_id, query, sampling, group_size))
            except EngineLost as lost:  # the partial turn that it carries is not a partial group
                raise EngineLost(str(lost), core_died=lost.core_died) from lost
        summary, group = self.actor.generate.remote(group_id, query, sampling, group_size, begun)
        return await _alive(value_or_cancel(summary)), group

    async def load(self) -> EngineLoad:
        """Return the engine's work at this moment."""
        return await _alive(value_of(self.actor.load.remote()))

    async def pause(self) -> int:
        """Freeze running requests, and return how many groups and turns of episodes there are."""
        return await _alive(value_of(self.actor.pause.remote()))

    async def resume(self) -> None:
        """Continue the frozen requests under the present weights."""
        await _alive(value_of(self.actor.resume.remote()))

    async def sleep(self) -> None:
        """Free the device's memory; running requests are frozen."""
        await _alive(value_of(self.actor.sleep.remote()))

    async def wake_up(self) -> None:
        """Take the device's memory back, and continue the frozen requests."""
        await _alive(value_of(self.actor.wake_up.remote()))

    async def receive_weights(self) -> None:
        """Begin to receive weights while generation continues."""
        await _alive(value_of(self.actor.receive_weights.remote()))

    async def install_weights(self, version: int) -> Installed:
        """Load the received weights; running requests are paused and continue under `version`."""
        return await _alive(value_of(self.actor.install_weights.remote(version)))

    async def policy_version(self) -> int:
        """Return the version that the engine's own process reports."""
        return await _alive(value_of(self.actor.policy_version.remote()))

    async def score(self, sequences: list[list[int]]) -> list[list[float]]:
        """Return the log-prob of each token but the first, in nats at temperature 1."""
        return await _alive(value_of(self.actor.score.remote(sequences)))

    async def sampling_error(self, sequences: list[list[int]]) -> float:
        """Return the mean difference of sampled tokens' log-probs from their scores, nats at temperature 1."""
        return await _alive(value_of(self.actor.sampling_error.remote(sequences)))

    async def parameter_checksums(self) -> list[dict[str, str]]:
        """Return dtype, shape and checksum of each worker's parameters by name."""
        return await _alive(value_of(self.actor.parameter_checksums.remote()))

    async def stacks(self) -> str:
        """Return the stack of every thread of the actor's process."""
        return await _alive(value_of(self.actor.stacks.remote()))

    def kill(self) -> None:
        """Kill the actor; the engine's processes die with it (weight_sync/vllm_plugin.py)."""
        ray.kill(self.actor)


async def _alive(work: Awaitable[T]) -> T:
    try:
        return await work
    except ACTOR_DIED as error:  # also if an environment's actor met it in a call of the engine
        raise EngineLost(last_line(error)) from error
    except RayTaskError as error:
        if isinstance(error.cause, EngineDied):
            raise EngineLost(str(error.cause), error.cause.begun, core_died=True) from error
        raise
