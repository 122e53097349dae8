"""The verifier actors, seen from the controller."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ray.exceptions import RayError

from quatro_ray.actors.calls import value_of
from quatro_ray.actors.pool import ActorPool
from quatro_ray.config import VerifierConfig
from quatro_ray.errors import last_line
from quatro_ray.failures import VerifierFailed
from quatro_ray.timeouts import within
from quatro_ray.types import DropReason, GroupSummary


class VerifierPool(ActorPool):
    """Deadlines of single responses are the actors' (isolation/worker_pool.py); this one holds those of groups.

    Args:
        spawn: makes a new actor (a handle).
    """

    def __init__(self, spawn: Callable[[], Any], config: VerifierConfig) -> None:
        super().__init__(spawn, config.num_actors, config.start_deadline_s)
        self._config = config

    async def score(self, group: Any) -> tuple[GroupSummary, Any]:
        """`group` is a reference; returns the summary of actors/verifier.py and a reference to the scored group.

        Raises:
            VerifierFailed: never a reward that the machinery made up.
        """
        failure = VerifierFailed(DropReason.VERIFIER_ERROR, "never tried")
        for _ in range(1 + self._config.max_retries):
            try:
                return await self._score_once(group)
            except VerifierFailed as error:
                failure = error
        raise failure

    async def _score_once(self, group: Any) -> tuple[GroupSummary, Any]:
        try:
            async with self.least_loaded() as actor:
                summary, scored = actor.score.remote(group)
                return await within(self._config.group_deadline_s, value_of(summary)), scored
        except TimeoutError as error:
            raise VerifierFailed(DropReason.VERIFIER_TIMEOUT, "a verifier did not answer in time") from error
        except RayError as error:  # it died, or a reward failed
            raise VerifierFailed(DropReason.VERIFIER_ERROR, last_line(error)) from error
