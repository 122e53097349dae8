"""The replay buffer: the ledger, plus the rules for who gets in, who gets out, and when."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from quatro_ray.config import ReplayConfig
from quatro_ray.errors import LedgerError
from quatro_ray.replay import serialization, staleness
from quatro_ray.replay.ledger import Entry, Ledger
from quatro_ray.replay.staleness import Lineage
from quatro_ray.types import DropReason, GroupState, Query, RolloutGroup

S = GroupState


@dataclass(frozen=True)
class Lease:
    """B groups for the step that starts from the version of `lineage`; `metrics` are about their age."""

    lineage: Lineage
    groups: tuple[RolloutGroup, ...]
    metrics: dict[str, float]


@dataclass(frozen=True)
class FallBack:
    """The learner continues from a checkpoint.

    Attributes:
        version: the new number of its policy. step: optimiser steps of it.
        num_ready: groups that were trained since and are ready again; num_pending: that are generated again, their
            tokens being of a policy that does not exist any more.
    """

    version: int
    step: int
    num_ready: int
    num_pending: int


class ReplayBuffer:
    """Waiting is back-pressure: nothing is ever thrown out to make room; admission stops instead.

    Every method may be called again after its answer was lost: the second call changes nothing.
    """

    def __init__(
        self, config: ReplayConfig, path: Path | str, *, num_steps: int, clock: Callable[[], float] = time.time
    ) -> None:
        self._config = config
        self._num_steps = num_steps
        self._clock = clock
        self.ledger = Ledger(path, clock)

    def capacity(self, version: int, num_idle: int = 0) -> int:
        """Groups that may be started while the engines have `version`; never more than the run can train.

        Args:
            num_idle: pending groups that nobody works on; they are the first that may be started.
        """
        counts = self.ledger.counts()
        num_live = sum(counts.values()) - counts[S.DROPPED] - num_idle
        by_age = staleness.capacity(
            max_staleness=self._config.max_staleness,
            step=self.ledger.versions.step_of(version),
            groups_per_step=self._config.groups_per_step,
            num_live=num_live,
        )
        return max(0, min(by_age, self._num_steps * self._config.groups_per_step - num_live))

    def admit(self, first_id: int, queries: Sequence[Query], version: int) -> list[int]:
        """Raises LedgerError beyond the capacity, and then admits none."""
        with self.ledger.transaction():
            if self.ledger.next_id() < first_id + len(queries) and len(queries) > (room := self.capacity(version)):
                raise LedgerError(f"{len(queries)} groups exceed the capacity of {room} at version {version}")
            return self.ledger.admit(first_id, queries, version)

    def start(self, group_id: int) -> None:
        self.ledger.move([group_id], S.GENERATING)

    def generated(self, group_id: int) -> None:
        self.ledger.move([group_id], S.VERIFYING)

    def retry(self, group_id: int) -> None:
        """Back to pending: whatever was under way for it is void."""
        self.ledger.move([group_id], S.PENDING)

    def ready(self, group: RolloutGroup) -> None:
        """
        Raises:
            LedgerError: a token is of a version that the learner has abandoned: it cannot be trained on.
            ValueError: a rollout has no score.
        """
        lineage = self.ledger.versions.lineage(self.ledger.versions.newest())
        for version in {span.version for rollout in group.rollouts for span in rollout.spans}:
            if not lineage.holds(version):
                raise LedgerError(f"group {group.group_id} has tokens of version {version}, which is abandoned")
        self.ledger.store(
            group.group_id,
            serialization.to_bytes(group),
            oldest_version=group.oldest_version,
            newest_version=group.newest_version,
            num_tokens=group.num_tokens,
            mean_reward=float(group.rewards().mean()),
        )

    def drop(self, group_id: int, reason: DropReason) -> None:
        self.ledger.move([group_id], S.DROPPED, reason=reason)

    def expire(self, lineage: Lineage) -> list[Entry]:
        """Drops what could no longer be trained within the cap; returns it, lengths and rewards included."""
        if self._config.on_stale == "train":
            return []
        stale = [
            entry
            for entry in self.ledger.entries(S.READY)
            if entry.oldest_version is not None and lineage.is_expired(entry.oldest_version, self._config.max_staleness)
        ]
        self.ledger.move([e.group_id for e in stale], S.DROPPED, reason=DropReason.STALE)
        return stale

    def lease(self, version: int) -> Lease | None:
        """The B ready groups with the oldest tokens, after expiry; None while there are fewer. What is leased already
        comes again.

        Not by admission: a group that is generated again would come before others that have waited longer, and those
        would expire.
        """
        lineage = self.ledger.versions.lineage(version)
        batch = [e for e in self.ledger.entries(S.LEASED) if e.learner_version == version]
        if not batch:
            self.expire(lineage)
            batch = self.ledger.entries(S.READY, limit=self._config.groups_per_step)
            if len(batch) < self._config.groups_per_step:
                return None
        groups = tuple(serialization.from_bytes(self.ledger.payload(e.group_id)) for e in batch)
        self.ledger.move([e.group_id for e in batch], S.LEASED, learner_version=version)
        return Lease(lineage, groups, self._age_metrics(batch, lineage))

    def _age_metrics(self, batch: Sequence[Entry], lineage: Lineage) -> dict[str, float]:
        now = self._clock()
        ages = lineage.staleness(np.array([e.oldest_version for e in batch]))
        waited = [now - e.ready_at for e in batch if e.ready_at is not None]
        return {
            "buffer/group_staleness_mean": float(np.mean(ages)),
            "buffer/group_staleness_max": float(np.max(ages)),
            "buffer/age_s_mean": float(np.mean([now - e.admitted_at for e in batch])),
            "buffer/wait_s_mean": float(np.mean(waited)),
            "buffer/size": float(self.ledger.counts()[S.READY]),
        }

    def commit(self, version: int) -> int:
        """leased → trained for the step that started from `version`, and the version that it made exists.

        Returns:
            The new version.

        Raises:
            LedgerError: there is no such lease.
        """
        leased = [e.group_id for e in self.ledger.entries(S.LEASED) if e.learner_version == version]
        if leased:
            with self.ledger.transaction():
                self.ledger.move(leased, S.TRAINED)
                self.ledger.versions.add_step(version)
        elif not any(e.learner_version == version for e in self.ledger.entries(S.TRAINED)):
            raise LedgerError(f"no group is leased to the step from version {version}")
        return version + 1

    def fall_back(self, version: int, known: int) -> FallBack:
        """The learner continues from the weights of `version`, under a new number.

        Groups that it was trained on since, or had leased, become ready again if their rollouts are kept and all their
        tokens belong to the lineage that continues. All other groups with tokens of abandoned versions become pending.

        Args:
            known: the newest version that the caller knows of: where there is a newer one, the call is a repetition.
        """
        versions = self.ledger.versions
        with self.ledger.transaction():
            if versions.newest() > known:
                return FallBack(versions.newest(), versions.step_of(version), 0, 0)
            again = [*self.ledger.entries(S.READY), *self.ledger.entries(S.LEASED)]
            trained = [
                e
                for e in self.ledger.entries(S.TRAINED)
                if e.learner_version is not None and e.learner_version >= version
            ]
            stored = self.ledger.with_payload()
            lineage = versions.lineage(version)
            lost = [e.group_id for e in [*again, *trained] if not self._can_be_trained(e, lineage, stored)]
            kept = {e.group_id for e in trained} - set(lost)
            self.ledger.move(lost, S.PENDING)
            self.ledger.move([e.group_id for e in [*again, *trained] if e.group_id not in set(lost)], S.READY)
            number = versions.add_fall_back(version)
        return FallBack(number, versions.step_of(version), len(kept), len(lost))

    def _can_be_trained(self, entry: Entry, lineage: Lineage, stored: set[int]) -> bool:
        """Checks only the newest token: when the group was stored, all its tokens belonged to the learner's lineage, of
        which `lineage` is a part."""
        return entry.group_id in stored and entry.newest_version is not None and lineage.holds(entry.newest_version)

    def recover(self) -> dict[str, Any]:
        """After the controller was lost: what was under way for it is pending. For the new one: `next_id` of a group,
        `num_admitted` by source, the `newest` version that was ever issued, and how many tokens there are at least."""
        with self.ledger.transaction():
            for state in (S.GENERATING, S.VERIFYING):
                self.ledger.move([e.group_id for e in self.ledger.entries(state)], S.PENDING)
        return {
            "next_id": self.ledger.next_id(),
            "num_admitted": self.ledger.num_admitted(),
            "newest": self.ledger.versions.newest(),
            "num_tokens": self.ledger.num_tokens(),
        }

    def pending(self) -> list[tuple[int, Query]]:
        """Group ids and queries, oldest first."""
        return self.ledger.queries(S.PENDING)

    def absorbed(self, version: int) -> int:
        """A checkpoint of `version`, the oldest that is kept, holds what was learnt from older groups: their rollouts
        are freed. Returns how many."""
        return self.ledger.forget_payloads(version)

    def flush(self) -> None:
        """What was committed so far survives the machine: before a checkpoint that builds on it."""
        self.ledger.flush()

    def end_run(self) -> None:
        """What was admitted ahead and is not needed any more is dropped, with that reason."""
        for state in (S.PENDING, S.GENERATING, S.VERIFYING, S.READY, S.LEASED):
            ids = [e.group_id for e in self.ledger.entries(state)]
            self.ledger.move(ids, S.DROPPED, reason=DropReason.RUN_ENDED)

    def stats(self) -> dict[str, Any]:
        """Counts by state and by reason of drop, how many groups were ever admitted, and how often the ledger was
        opened: once for each life of the buffer."""
        return {
            "admitted": self.ledger.next_id() - 1,
            "opened": self.ledger.times_opened,
            "groups": {str(k): v for k, v in self.ledger.counts().items()},
            "drops": {str(k): v for k, v in self.ledger.drops().items()},
        }
