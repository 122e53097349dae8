"""The replay buffer as a Ray actor: the one process that holds the ledger."""

from __future__ import annotations

from pathlib import Path

import ray

from quatro_ray.actors.base import WATCHED, HostMixin
from quatro_ray.actors.memory import collect_rarely
from quatro_ray.config import ReplayConfig
from quatro_ray.replay.buffer import LeasedBatch, LeaseSummary, ReplayBuffer
from quatro_ray.replay.ledger_reader import tell_host


@ray.remote(concurrency_groups=WATCHED)
class ReplayActor(HostMixin, ReplayBuffer):
    """The methods of ReplayBuffer; groups are passed by reference."""

    def __init__(self, config: ReplayConfig, path: Path, *, num_steps: int) -> None:
        super().__init__(config, path, num_steps=num_steps)
        tell_host(path)
        collect_rarely()

    @ray.method(num_returns=2)
    def lease(self, version: int, num_samples: int = 0) -> tuple[LeaseSummary | None, LeasedBatch | None]:
        """Lease as ReplayBuffer.lease does, but return two references, so that the caller need not fetch the batch."""
        return super().lease(version, num_samples)
