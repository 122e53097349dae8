"""The replay buffer: the ledger, and the rules for admission, leasing and expiry of groups."""

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
from quatro_ray.replay.batch_metrics import batch_metrics, drop_metrics
from quatro_ray.replay.ledger import Entry, Ledger
from quatro_ray.replay.staleness import Lineage
from quatro_ray.types import DropReason, GroupState, Query, RolloutGroup, StepMetrics

S = GroupState


@dataclass(frozen=True)
class LeasedBatch:
    """The data of one optimiser step.

    Attributes:
        groups: the B groups.
        lineage: lineage of the version that the step trains from.
    """

    groups: tuple[RolloutGroup, ...]
    lineage: Lineage


@dataclass(frozen=True)
class LeaseSummary:
    """The controller's view of a leased batch.

    Attributes:
        metrics: by metric name, rewards, lengths and ages of the batch (tokens, optimiser steps, seconds), the size of
            the buffer, and what expired before this batch was complete.
        samples: a few groups in the readable form of replay/serialization.py.
    """

    metrics: StepMetrics
    samples: list[dict[str, Any]]


@dataclass(frozen=True)
class RecoveredState:
    """The state of a ledger, from which a new controller continues.

    Attributes:
        next_id: the id of the next group to admit.
        num_admitted: groups admitted so far, by source.
        newest_version: the newest policy version that was ever issued.
        num_tokens: sampled tokens of all groups that were ever ready, a lower bound of all generated tokens.
        num_damaged: groups whose stored rollouts cannot be read; those that a step still needs are generated again.
    """

    next_id: int
    num_admitted: dict[str, int]
    newest_version: int
    num_tokens: int
    num_damaged: int


@dataclass(frozen=True)
class ReplayStats:
    """The ledger in numbers.

    Attributes:
        num_admitted: groups that were ever admitted.
        num_opened: how often the ledger was opened, once for each life of the buffer.
        groups: groups by state.
        drops: dropped groups by reason.
    """

    num_admitted: int
    num_opened: int
    groups: dict[str, int]
    drops: dict[str, int]


@dataclass(frozen=True)
class FallBack:
    """The effect of a fall-back to a checkpoint on versions and groups.

    Attributes:
        version: the new version number of the learner's policy.
        step: optimiser steps of that policy.
        num_ready: groups that were trained since the checkpoint and are ready again.
        num_pending: groups that are generated again, because a policy that no longer exists sampled their tokens.
    """

    version: int
    step: int
    num_ready: int
    num_pending: int


class ReplayBuffer:
    """Admits, holds and leases groups under the staleness rule.

    A full buffer exerts back-pressure: admission stops, and no group is thrown out to make room. Every method is
    idempotent, so a call whose answer was lost may be repeated.

    Args:
        path: file of the ledger.
        num_steps: optimiser steps of the run; no more groups are admitted than these steps train.
        clock: returns seconds since the epoch.
    """

    def __init__(
        self, config: ReplayConfig, path: Path | str, *, num_steps: int, clock: Callable[[], float] = time.time
    ) -> None:
        self._config = config
        self._num_steps = num_steps
        self._clock = clock
        self.ledger = Ledger(path, clock)

    def capacity(self, version: int, num_idle: int = 0) -> int:
        """Return how many groups may be started while the engines have `version`, at most as many as the run can train.

        Args:
            version: the policy version of the engines.
            num_idle: pending groups that no task works on. They count as free places, because they are started first.
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
        """Admit `queries` as pending groups numbered from `first_id`, and return their ids.

        Args:
            first_id: id of the first group. If the call is repeated with the same one, nothing is admitted twice.
            queries: one for each group.
            version: the policy version of the engines.

        Raises:
            LedgerError: the queries exceed the capacity; none is admitted.
        """
        with self.ledger.transaction():
            if self.ledger.next_id() < first_id + len(queries) and len(queries) > (room := self.capacity(version)):
                raise LedgerError(f"{len(queries)} groups exceed the capacity of {room} at version {version}")
            return self.ledger.admit(first_id, queries, version)

    def ready(self, group: RolloutGroup) -> None:
        """Store a scored group, which may be leased from now on.

        Raises:
            LedgerError: the learner has abandoned the version of a token, so the group cannot be trained on.
            ValueError: a rollout has no score.
        """
        lineage = self.ledger.versions.lineage(self.ledger.versions.newest())
        versions = group.versions()
        for version in versions:
            if not lineage.holds(version):
                raise LedgerError(f"group {group.group_id} has tokens of version {version}, which is abandoned")
        self.ledger.store(
            group.group_id,
            serialization.to_bytes(group),
            oldest_version=min(versions),
            newest_version=max(versions),
            num_tokens=group.num_tokens,
            mean_reward=float(group.rewards().mean()),
        )

    def drop(self, group_id: int, reason: DropReason) -> None:
        """Drop a group for good."""
        self.ledger.move([group_id], S.DROPPED, reason=reason)

    def expire(self, lineage: Lineage) -> list[Entry]:
        """Drop the ready groups that exceed the maximum staleness, and return their entries."""
        if self._config.on_stale == "train":
            return []
        stale = self.ledger.older_than(lineage.oldest_within(self._config.max_staleness))
        ids = [e.group_id for e in stale]
        self.ledger.move(ids, S.DROPPED, reason=DropReason.STALE, learner_version=lineage.version)
        return stale

    def lease(self, version: int, num_samples: int = 0) -> tuple[LeaseSummary | None, LeasedBatch | None]:
        """Lease the B ready groups with the oldest tokens, after dropping expired ones.

        The order is by the oldest token and not by admission: a group that is generated again would otherwise precede
        groups that have waited longer, and those would expire. A batch that is leased already is returned again.

        Args:
            version: the learner's version, from which the step trains.
            num_samples: number of groups that the summary holds in readable form.

        Returns:
            A summary and the batch, or None twice while fewer than B groups are ready.
        """
        lineage = self.ledger.versions.lineage(version)
        batch = self.ledger.of_learner(S.LEASED, version)
        if not batch:
            self.expire(lineage)
            if self.ledger.counts()[S.READY] < self._config.groups_per_step:
                return None, None
            batch = self.ledger.entries(S.READY, limit=self._config.groups_per_step)
        groups = tuple(serialization.from_bytes(self.ledger.payload(e.group_id)) for e in batch)
        self.ledger.move([e.group_id for e in batch], S.LEASED, learner_version=version)
        samples = [serialization.readable(g) for g in groups[:num_samples]]
        metrics = batch_metrics(groups) | self._age_metrics(batch, lineage) | self._expired_metrics(version)
        return LeaseSummary(metrics, samples), LeasedBatch(groups, lineage)

    def _expired_metrics(self, version: int) -> StepMetrics:
        """Return the metrics of groups that expired while a batch for `version` was awaited."""
        dropped = [e for e in self.ledger.of_learner(S.DROPPED, version) if e.reason is DropReason.STALE]
        expired = [serialization.from_bytes(self.ledger.payload(e.group_id)) for e in dropped]
        return dict(drop_metrics(DropReason.STALE, expired))

    def _age_metrics(self, batch: Sequence[Entry], lineage: Lineage) -> StepMetrics:
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
        """Record that the batch leased from `version` is trained, and issue the version of the resulting policy.

        Returns:
            The new version.

        Raises:
            LedgerError: no batch is leased from `version`.
        """
        leased = [e.group_id for e in self.ledger.of_learner(S.LEASED, version)]
        if leased:
            with self.ledger.transaction():
                self.ledger.move(leased, S.TRAINED)
                self.ledger.versions.add_step(version)
        elif not self.ledger.of_learner(S.TRAINED, version):
            raise LedgerError(f"no group is leased to the step from version {version}")
        return version + 1

    def fall_back(self, version: int, known: int) -> FallBack:
        """Continue from the weights of `version` under a new version number.

        Groups that it was trained on since, or had leased, become ready again if their rollouts are kept and all their
        tokens belong to the lineage that continues. All other groups with tokens of abandoned versions become pending.

        Args:
            version: the version of the checkpoint.
            known: the newest version that the caller knows of. If a newer one exists, the call is a repetition.
        """
        versions = self.ledger.versions
        with self.ledger.transaction():
            if versions.newest() > known:
                return FallBack(versions.newest(), versions.step_of(version), 0, 0)
            again = [*self.ledger.entries(S.READY), *self.ledger.entries(S.LEASED)]
            trained = self.ledger.of_learner(S.TRAINED, version, or_later=True)
            lineage = versions.lineage(version)
            lost = {e.group_id for e in [*again, *trained] if not self._can_be_trained(e, lineage)}
            kept = {e.group_id for e in trained} - lost
            self.ledger.move(sorted(lost), S.PENDING)
            self.ledger.move([e.group_id for e in [*again, *trained] if e.group_id not in lost], S.READY)
            number = versions.add_fall_back(version)
        return FallBack(number, versions.step_of(version), len(kept), len(lost))

    def _can_be_trained(self, entry: Entry, lineage: Lineage) -> bool:
        """Return whether the group's rollouts are stored and all its tokens belong to `lineage`.

        The newest token is enough: when the group was stored, all its tokens belonged to the learner's lineage then, of
        which `lineage` is a part.
        """
        held = entry.newest_version is not None and lineage.holds(entry.newest_version)
        return held and self.ledger.has_payload(entry.group_id)

    def recover(self) -> RecoveredState:
        """Return the ledger's state after the loss of a controller, or of the learner; check all stored rollouts.

        Ready groups whose rollouts cannot be read become pending, as are the groups that were in progress.
        """
        num_damaged = self.ledger.forget_damaged()
        return RecoveredState(
            next_id=self.ledger.next_id(),
            num_admitted=self.ledger.num_admitted(),
            newest_version=self.ledger.versions.newest(),
            num_tokens=self.ledger.num_tokens(),
            num_damaged=num_damaged,
        )

    def pending(self) -> list[tuple[int, Query]]:
        """Return ids and queries of the pending groups, oldest first."""
        return self.ledger.queries(S.PENDING)

    def absorbed(self, version: int) -> int:
        """Free the rollouts of groups trained before `version`, the oldest checkpoint that is kept; return how many."""
        return self.ledger.forget_payloads(version, self._config.keep_steps)

    def snapshot(self, path: Path) -> None:
        """Write all commits to the disk, before a checkpoint relies on them, and a copy of the ledger to `path`."""
        self.ledger.flush()
        self.ledger.snapshot(path)

    def end_run(self) -> None:
        """Drop all groups that were admitted ahead and are no longer needed, with the reason `run_ended`."""
        for state in (S.PENDING, S.READY, S.LEASED):
            ids = [e.group_id for e in self.ledger.entries(state)]
            self.ledger.move(ids, S.DROPPED, reason=DropReason.RUN_ENDED)

    def stats(self) -> ReplayStats:
        """Return the number of groups by state and by reason of drop."""
        return ReplayStats(
            num_admitted=self.ledger.next_id() - 1,
            num_opened=self.ledger.times_opened,
            groups={str(k): v for k, v in self.ledger.counts().items()},
            drops={str(k): v for k, v in self.ledger.drops().items()},
        )
