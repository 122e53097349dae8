"""Small buffers for tests."""

from __future__ import annotations

from pathlib import Path

from quatro_ray.config import ReplayConfig
from quatro_ray.replay.buffer import ReplayBuffer
from quatro_ray.types import Query
from tests.make import group, rollout


def make_buffer(path: Path | str = ":memory:", **over: object) -> ReplayBuffer:
    config = ReplayConfig(**({"groups_per_step": 2, "group_size": 2, "max_staleness": 1} | over))
    return ReplayBuffer(config, path, num_steps=10)


def to_ready(buffer: ReplayBuffer, count: int, version: int = 0) -> list[int]:
    """Each group has tokens of `version`, and of the next one where that exists."""
    newer_from = 1 if buffer.ledger.versions.newest() > version else None
    ids = buffer.admit(buffer.ledger.next_id(), [Query(str(i), "p", "a") for i in range(count)], version)
    for i in ids:
        buffer.ready(group(i, rollout(version=version), rollout(version=version, newer_from=newer_from)))
    return ids
