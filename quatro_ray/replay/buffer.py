"""The replay buffer: the ledger, plus the rules for who gets in, who gets out, and when."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from quatro_ray.config import ReplayConfig
from quatro_ray.errors import LedgerError
from quatro_ray.replay import serial, staleness
from quatro_ray.replay.ledger import Entry, Ledger
from quatro_ray.types import DropReason, GroupState, Query, RolloutGroup


@dataclass(frozen=True)
class Lease:
    """B groups for the step that starts from `version`; `metrics` are about their age."""

    version: int
    groups: tuple[RolloutGroup, ...]
    metrics: dict[str, float]


class ReplayBuffer:
    """Waiting is back-pressure: nothing is ever thrown out to make room; admission stops instead."""

    def __init__(
        self, config: ReplayConfig, path: Path | str, *, num_steps: int, clock: Callable[[], float] = time.time
    ) -> None:
        self._config = config
        self._num_steps = num_steps
        self._clock = clock
        self.ledger = Ledger(path, clock)

    def capacity(self, version: int) -> int:
        """Groups that may be admitted while the engines have `version`; never more than the run can train."""
        counts = self.ledger.counts()
        num_live = sum(counts.values()) - counts[GroupState.DROPPED]
        by_age = staleness.capacity(
            max_staleness=self._config.max_staleness,
            version=version,
            groups_per_step=self._config.groups_per_step,
            num_live=num_live,
        )
        return min(by_age, self._num_steps * self._config.groups_per_step - num_live)

    def admit(self, queries: Sequence[Query], version: int) -> list[int]:
        """Raises LedgerError beyond the capacity, and then admits none."""
        if len(queries) > (room := self.capacity(version)):
            raise LedgerError(f"{len(queries)} groups exceed the capacity of {room} at version {version}")
        return self.ledger.admit(queries, version)

    def start(self, group_id: int) -> None:
        self.ledger.move([group_id], GroupState.GENERATING)

    def generated(self, group_id: int) -> None:
        self.ledger.move([group_id], GroupState.VERIFYING)

    def retry(self, group_id: int) -> None:
        """Back to pending: whatever was under way for it is void."""
        self.ledger.move([group_id], GroupState.PENDING)

    def ready(self, group: RolloutGroup) -> None:
        """Raises ValueError where a rollout has no score."""
        self.ledger.store(
            group.group_id,
            serial.to_bytes(group),
            oldest_version=group.oldest_version,
            num_tokens=group.num_tokens,
            mean_reward=float(group.rewards().mean()),
        )

    def drop(self, group_id: int, reason: DropReason) -> None:
        self.ledger.move([group_id], GroupState.DROPPED, reason=reason)

    def expire(self, version: int) -> list[Entry]:
        """Drops what could no longer be trained within the cap; returns it, lengths and rewards included."""
        if self._config.on_stale == "train":
            return []
        stale = [
            entry
            for entry in self.ledger.entries(GroupState.READY)
            if entry.oldest_version is not None
            and staleness.is_expired(
                oldest_version=entry.oldest_version,
                learner_version=version,
                max_staleness=self._config.max_staleness,
            )
        ]
        self.ledger.move([e.group_id for e in stale], GroupState.DROPPED, reason=DropReason.STALE)
        return stale

    def lease(self, version: int) -> Lease | None:
        """The B oldest ready groups, after expiry; None while there are fewer."""
        self.expire(version)
        batch = self.ledger.entries(GroupState.READY, limit=self._config.groups_per_step)
        if len(batch) < self._config.groups_per_step:
            return None
        groups = tuple(serial.from_bytes(self.ledger.payload(e.group_id)) for e in batch)
        self.ledger.move([e.group_id for e in batch], GroupState.LEASED, step=version)
        return Lease(version, groups, self._age_metrics(batch, version))

    def _age_metrics(self, batch: Sequence[Entry], version: int) -> dict[str, float]:
        now = self._clock()
        versions = [staleness.staleness(version, e.oldest_version) for e in batch]
        waited = [now - e.ready_at for e in batch if e.ready_at is not None]
        return {
            "buffer/group_staleness_mean": float(np.mean(versions)),
            "buffer/group_staleness_max": float(np.max(versions)),
            "buffer/age_s_mean": float(np.mean([now - e.admitted_at for e in batch])),
            "buffer/wait_s_mean": float(np.mean(waited)),
            "buffer/size": float(self.ledger.counts()[GroupState.READY]),
        }

    def commit(self, version: int) -> None:
        """leased → trained for the step that started from `version`.

        Raises:
            LedgerError: there is no such lease.
        """
        leased = [e.group_id for e in self.ledger.entries(GroupState.LEASED) if e.step == version]
        if not leased:
            raise LedgerError(f"no group is leased to the step from version {version}")
        self.ledger.move(leased, GroupState.TRAINED)

    def end_run(self) -> None:
        """What was admitted ahead and is not needed any more is dropped, with that reason."""
        self.ledger.release_leases()
        for state in (GroupState.PENDING, GroupState.GENERATING, GroupState.VERIFYING, GroupState.READY):
            ids = [e.group_id for e in self.ledger.entries(state)]
            self.ledger.move(ids, GroupState.DROPPED, reason=DropReason.RUN_ENDED)

    def stats(self) -> dict[str, dict[str, int]]:
        """Counts by state and by reason of drop."""
        return {
            "groups": {str(k): v for k, v in self.ledger.counts().items()},
            "drops": {str(k): v for k, v in self.ledger.drops().items()},
        }
