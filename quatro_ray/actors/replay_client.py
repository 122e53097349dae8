"""The replay actor as a plain async object, which restarts the actor if it hangs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayTaskError

from quatro_ray.actors.calls import value_of
from quatro_ray.actors.interfaces import GroupRef, LeasedRef
from quatro_ray.errors import DiskFull, LedgerLocked, StallError
from quatro_ray.replay.buffer import FallBack, LeaseSummary, RecoveredState, ReplayStats
from quatro_ray.timeouts import within
from quatro_ray.types import DropReason, Query

if TYPE_CHECKING:
    from ray.actor import ActorHandle


class ReplayClient:
    """The methods of ReplayBuffer as coroutines.

    Ray restarts an actor that dies and repeats the call; an actor that hangs is killed first. Every call raises
    StallError if the actor does not answer within the deadline, retries included.

    Args:
        actor: a ReplayActor.
        deadline_s: how long one call may take, in seconds.
    """

    _TRIES = 3

    def __init__(self, actor: ActorHandle, deadline_s: float) -> None:
        self._actor = actor
        self._deadline_s = deadline_s

    async def recover(self) -> RecoveredState:
        """Check all stored rollouts, and return the ledger's state."""
        return await self._call("recover")

    async def pending(self) -> list[tuple[int, Query]]:
        """Return ids and queries of the pending groups, oldest first."""
        return await self._call("pending")

    async def capacity(self, version: int, num_idle: int = 0) -> int:
        """Return how many groups may be started while the engines have `version`."""
        return await self._call("capacity", version, num_idle)

    async def admit(self, first_id: int, queries: list[Query], version: int) -> list[int]:
        """Admit `queries` as pending groups numbered from `first_id`, and return their ids."""
        return await self._call("admit", first_id, queries, version)

    async def ready(self, group: GroupRef) -> None:
        """Store a scored group, which may be leased from now on."""
        await self._call("ready", group)

    async def drop(self, group_id: int, reason: DropReason) -> None:
        """Drop a group for good."""
        await self._call("drop", group_id, reason)

    async def lease(self, version: int, num_samples: int = 0) -> tuple[LeaseSummary | None, LeasedRef]:
        """Return a summary, and a reference to the LeasedBatch, which only the learner reads."""
        return await self._try(lambda: self._actor.lease.remote(version, num_samples))

    async def commit(self, version: int) -> int:
        """Record that the batch leased from `version` is trained, and return the new version."""
        return await self._call("commit", version)

    async def fall_back(self, version: int, known: int) -> FallBack:
        """Continue from the weights of `version` under a new version number."""
        return await self._call("fall_back", version, known)

    async def snapshot(self, path: Path) -> None:
        """Write all changes to the disk, and a copy of the ledger's database to a file."""
        await self._call("snapshot", path)

    async def absorbed(self, version: int) -> int:
        """Free the rollouts of groups trained before `version`, and return the number of these groups."""
        return await self._call("absorbed", version)

    async def end_run(self) -> None:
        """Drop all groups that are neither trained nor dropped."""
        await self._call("end_run")

    async def stats(self) -> ReplayStats:
        """Return the number of groups by state and by reason of drop."""
        return await self._call("stats")

    async def _call(self, method: str, *args: object) -> Any:
        return (await self._try(lambda: (getattr(self._actor, method).remote(*args), None)))[0]

    async def _try(self, call: Callable[[], tuple[Any, Any]]) -> tuple[Any, Any]:
        """Return the value of the first of two references, and the second reference unchanged."""
        for _ in range(self._TRIES):
            answer, rest = call()
            try:
                return await within(self._deadline_s, value_of(answer)), rest
            except TimeoutError:
                self._restart()
            except RayTaskError as error:
                if not isinstance(error.cause, DiskFull | LedgerLocked):
                    raise
                await asyncio.sleep(self._deadline_s)  # the disk may get space meanwhile, or the other program end
        raise self._stalled()

    def _restart(self) -> None:
        ray.kill(self._actor, no_restart=False)

    def _stalled(self) -> StallError:
        return StallError(
            f"the replay buffer did not answer within replay.deadline_s={self._deadline_s:g} s in {self._TRIES} tries, "
            "although it was restarted; check whether the disk of run.dir is full or gone, or its ledger locked"
        )
