"""The pool of verifier actors that the controller and evaluation use."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ray.actor import ActorHandle
from ray.exceptions import RayError

from quatro_ray.actors.calls import value_of
from quatro_ray.actors.pool import ActorPool
from quatro_ray.config import VerifierConfig
from quatro_ray.errors import last_line
from quatro_ray.failures import NoVerdict, RewardUnavailable, VerifierFailed
from quatro_ray.timeouts import within
from quatro_ray.types import DropReason, GroupSummary

if TYPE_CHECKING:
    from quatro_ray.actors.interfaces import GroupRef, ScoredGroup


class VerifierPool(ActorPool):
    """Scores groups within a deadline for each; the actors enforce that of each response (isolation/worker_pool.py).

    Args:
        spawn: makes a new VerifierActor.
    """

    def __init__(self, spawn: Callable[[], ActorHandle], config: VerifierConfig) -> None:
        super().__init__(spawn, config.num_actors, config.start_deadline_s)
        self._config = config

    async def score(self, group: GroupRef) -> tuple[GroupSummary, ScoredGroup]:
        """Return the summary of the scores, and a reference to the scored group.

        Raises:
            VerifierFailed: every try failed; a failure never becomes a reward.
        """
        failure = VerifierFailed(DropReason.VERIFIER_ERROR, "never tried")
        for _ in range(1 + self._config.max_retries):
            try:
                return await self._score_once(group)
            except VerifierFailed as error:
                failure = error
        raise failure

    async def _score_once(self, group: GroupRef) -> tuple[GroupSummary, ScoredGroup]:
        try:
            async with self.least_loaded() as actor:
                summary, scored = actor.score.remote(group)
                return await within(self._config.group_deadline_s, value_of(summary)), scored
        except TimeoutError as error:
            raise VerifierFailed(DropReason.VERIFIER_TIMEOUT, "a verifier did not answer in time") from error
        except RayError as error:  # the actor died, or a reward failed
            cause = getattr(error, "cause", None)
            reason = DropReason.NO_VERDICT if isinstance(cause, NoVerdict) else DropReason.VERIFIER_ERROR
            told = str(cause) if isinstance(cause, RewardUnavailable) else last_line(error)
            raise VerifierFailed(reason, told) from error
