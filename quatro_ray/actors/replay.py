"""The replay buffer as a Ray actor: the one process that holds the ledger."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ray

from quatro_ray.actors.base import WATCHED, HostMixin
from quatro_ray.config import ReplayConfig
from quatro_ray.replay.buffer import FallBack, ReplayBuffer
from quatro_ray.replay.serialization import readable
from quatro_ray.replay.staleness import Lineage
from quatro_ray.types import DropReason, Query, RolloutGroup


@ray.remote(concurrency_groups=WATCHED)
class ReplayActor(HostMixin):
    """Methods mirror ReplayBuffer; groups come and go by reference."""

    def __init__(self, config: ReplayConfig, path: Path, *, num_steps: int) -> None:
        self._buffer = ReplayBuffer(config, path, num_steps=num_steps)

    def recover(self) -> dict[str, Any]:
        return self._buffer.recover()

    def pending(self) -> list[tuple[int, Query]]:
        return self._buffer.pending()

    def capacity(self, version: int, num_idle: int) -> int:
        return self._buffer.capacity(version, num_idle)

    def admit(self, first_id: int, queries: list[Query], version: int) -> list[int]:
        return self._buffer.admit(first_id, queries, version)

    def start(self, group_id: int) -> None:
        self._buffer.start(group_id)

    def generated(self, group_id: int) -> None:
        self._buffer.generated(group_id)

    def retry(self, group_id: int) -> None:
        self._buffer.retry(group_id)

    def ready(self, group: RolloutGroup) -> None:
        self._buffer.ready(group)

    def drop(self, group_id: int, reason: DropReason) -> None:
        self._buffer.drop(group_id, reason)

    @ray.method(num_returns=2)
    def lease(
        self, version: int, num_samples: int
    ) -> tuple[dict[str, Any] | None, tuple[tuple[RolloutGroup, ...], Lineage] | None]:
        """Age metrics and a few groups in readable form (None while there are too few groups); and what the learner
        needs: the groups, and the lineage of its version."""
        lease = self._buffer.lease(version)
        if lease is None:
            return None, None
        samples = [readable(g) for g in lease.groups[:num_samples]]
        return {"metrics": lease.metrics, "samples": samples}, (lease.groups, lease.lineage)

    def commit(self, version: int) -> int:
        return self._buffer.commit(version)

    def fall_back(self, version: int, known: int) -> FallBack:
        return self._buffer.fall_back(version, known)

    def flush(self) -> None:
        self._buffer.flush()

    def absorbed(self, version: int) -> int:
        return self._buffer.absorbed(version)

    def end_run(self) -> None:
        self._buffer.end_run()

    def stats(self) -> dict[str, Any]:
        return self._buffer.stats()
