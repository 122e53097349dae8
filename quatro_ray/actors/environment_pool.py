"""The actors of one environment, seen from the clients of the engines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ray.exceptions import RayActorError, RayTaskError

from quatro_ray.actors.calls import value_or_cancel
from quatro_ray.actors.pool import ActorPool
from quatro_ray.config import EnvironmentConfig
from quatro_ray.errors import last_line
from quatro_ray.failures import EnvironmentFailed, GenerationFailed
from quatro_ray.types import DropReason, GenerationSummary, Query, SamplingParams


class EnvironmentPool(ActorPool):
    """`spawn`: makes a new actor (a handle)."""

    def __init__(self, spawn: Callable[[], Any], config: EnvironmentConfig) -> None:
        super().__init__(spawn, config.num_actors, config.start_deadline_s)

    async def play(
        self, engine: Any, group_id: int, query: Query, sampling: SamplingParams, size: int
    ) -> tuple[GenerationSummary, Any]:
        """A summary, and a reference to the group. The deadline of the group is the caller's.

        Raises:
            GenerationFailed: the environment failed.
            RayError: the engine did.
        """
        try:
            async with self.least_loaded() as actor:
                summary, group = actor.play.remote(engine, group_id, query, sampling, size)
                return await value_or_cancel(summary), group
        except RayTaskError as error:
            if isinstance(error.cause, EnvironmentFailed):
                raise GenerationFailed(error.cause.reason, error.cause.detail) from error
            raise
        except TimeoutError as error:
            raise GenerationFailed(DropReason.ENVIRONMENT_TIMEOUT, "an actor did not start in time") from error
        except RayActorError as error:
            raise GenerationFailed(DropReason.ENVIRONMENT_ERROR, last_line(error)) from error
