"""The pool of one environment's actors; generator clients play episodes through it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayTaskError

from quatro_ray.actors.calls import value_or_cancel
from quatro_ray.actors.pool import ActorPool
from quatro_ray.config import EnvironmentConfig
from quatro_ray.errors import last_line
from quatro_ray.failures import EnvironmentFailed, GenerationFailed
from quatro_ray.types import DropReason, GenerationSummary, Query, SamplingParams

if TYPE_CHECKING:
    from quatro_ray.actors.interfaces import GroupRef


class EnvironmentPool(ActorPool):
    """Plays groups of episodes.

    Args:
        spawn: makes a new EnvironmentActor.
    """

    def __init__(self, spawn: Callable[[], ActorHandle], config: EnvironmentConfig) -> None:
        super().__init__(spawn, config.num_actors, config.start_deadline_s)

    async def play(
        self, engine: ActorHandle, group_id: int, query: Query, sampling: SamplingParams, size: int
    ) -> tuple[GenerationSummary, GroupRef]:
        """Return the summary of a group of episodes, and a reference to it. The caller enforces the group's deadline.

        Args:
            engine: the generator actor that samples the policy's turns.
            group_id: id that the returned group carries; it has no effect on the episodes.
            query: its prompt begins every episode, and the environment's function receives all its fields.
            sampling: `max_tokens` bounds each response; each episode derives its own seed from `seed`.
            size: number of episodes.

        Raises:
            GenerationFailed: the environment failed.
            RayError: the engine failed.
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
            raise GenerationFailed(
                DropReason.ENVIRONMENT_TIMEOUT, "an environment actor did not start in time"
            ) from error
        except RayActorError as error:
            raise GenerationFailed(DropReason.ENVIRONMENT_ERROR, last_line(error)) from error
