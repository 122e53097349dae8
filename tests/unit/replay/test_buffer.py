"""The ledger and the buffer: a random interleaving of everything that can happen, and the cases by hand."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from quatro_ray.config import ReplayConfig
from quatro_ray.errors import DiskFull, LedgerError
from quatro_ray.replay import serialization, staleness
from quatro_ray.replay.buffer import ReplayBuffer
from quatro_ray.replay.ledger import TRANSITIONS, Ledger
from quatro_ray.replay.staleness import Lineage, Stretch
from quatro_ray.types import DropReason, GroupState, Query, RolloutGroup
from tests.make import group, rollout
from tests.unit.replay.buffers import make_buffer, to_ready

S = GroupState


class RingMachine(RuleBasedStateMachine):
    """Any order of admit, ready, lease, commit, checkpoint, fall-back, drop, and of calls made twice, as Ray does where
    an answer was lost."""

    GROUPS_PER_STEP, MAX_STALENESS, NUM_STEPS = 2, 2, 6

    def __init__(self) -> None:
        super().__init__()
        config = ReplayConfig(groups_per_step=self.GROUPS_PER_STEP, group_size=2, max_staleness=self.MAX_STALENESS)
        self.buffer = ReplayBuffer(config, ":memory:", num_steps=self.NUM_STEPS)
        self.version = 0
        self.saved = [0]  # versions of checkpoints
        self.leased: list[int] = []
        self.admitted: set[int] = set()
        self.made: dict[int, RolloutGroup] = {}  # those that were ready once
        self.trained: dict[int, int] = {}  # by group, the version that it was trained from

    def _ids(self, *states: GroupState) -> list[int]:
        return [e.group_id for s in states for e in self.buffer.ledger.entries(s)]

    @rule(extra=st.integers(0, 2), data=st.data())
    def admit(self, extra: int, data: st.DataObject) -> None:
        room = self.buffer.capacity(self.version)
        count = data.draw(st.integers(0, room)) + (extra if extra == 2 else 0)
        queries = [Query(str(i), "p", "a") for i in range(count)]
        if count > room:
            with pytest.raises(LedgerError):
                self.buffer.admit(len(self.admitted) + 1, queries, self.version)
        else:
            first = len(self.admitted) + 1
            ids = self.buffer.admit(first, queries, self.version)
            assert self.buffer.admit(first, queries, self.version) == ids
            self.admitted |= set(ids)

    @rule(data=st.data())
    def progress(self, data: st.DataObject) -> None:
        """A pending group becomes ready, or is dropped."""
        ids = self._ids(S.PENDING)
        if not ids:
            return
        group_id = data.draw(st.sampled_from(ids))
        if data.draw(st.sampled_from(["go", "go", "go", "drop"])) == "drop":
            self.buffer.drop(group_id, DropReason.VERIFIER_ERROR)
            return
        version = data.draw(st.integers(max(0, self.version - 4), self.version))
        made = group(group_id, rollout(version=version), rollout(version=version, reward=0.0))
        if self.buffer.ledger.versions.lineage(self.version).holds(version):
            self.buffer.ready(made)
            self.made[group_id] = made
        else:
            with pytest.raises(LedgerError, match=f"tokens of version {version}, which is abandoned"):
                self.buffer.ready(made)

    @precondition(lambda self: self.made)
    @rule(data=st.data())
    def is_told_again_that_a_group_is_ready(self, data: st.DataObject) -> None:
        """However late; a group that was leased or trained since is not made ready again."""
        group_id = data.draw(st.sampled_from(sorted(self.made)))
        ledger = self.buffer.ledger
        before = ledger._state(group_id)
        line = ledger.versions.lineage(self.version)
        if before is S.PENDING or not all(map(line.holds, self.made[group_id].versions())):
            return
        if before is S.DROPPED:
            with pytest.raises(LedgerError, match="is dropped and may not become ready"):
                self.buffer.ready(self.made[group_id])
        else:
            self.buffer.ready(self.made[group_id])
        assert ledger._state(group_id) is before

    @precondition(lambda self: not self.leased)
    @rule()
    def lease(self) -> None:
        _, lease = self.buffer.lease(self.version)
        if lease is None:
            assert len(self._ids(S.READY)) < self.GROUPS_PER_STEP
            return
        assert len(lease.groups) == self.GROUPS_PER_STEP
        assert lease.lineage.version == self.version
        for leased in lease.groups:
            assert all(lease.lineage.holds(version) for version in leased.versions())
            assert lease.lineage.staleness(np.array(list(leased.versions()))).max() <= self.MAX_STALENESS
        self.leased = [g.group_id for g in lease.groups]
        _, again = self.buffer.lease(self.version)
        assert again is not None and [g.group_id for g in again.groups] == self.leased

    @precondition(lambda self: self.leased)
    @rule()
    def commit(self) -> None:
        for _ in range(2):
            assert self.buffer.commit(self.version) == self.version + 1
        self.trained |= dict.fromkeys(self.leased, self.version)
        self.leased = []
        self.version += 1

    @precondition(lambda self: not self.leased)
    @rule(keep=st.integers(1, 3))
    def checkpoint(self, keep: int) -> None:
        """Older ones go, and rollouts that only they would need."""
        self.saved = [*self.saved, self.version][-keep:]
        self.buffer.absorbed(self.saved[0])

    @rule(data=st.data())
    def learner_falls_back(self, data: st.DataObject) -> None:
        """To a checkpoint that is kept, or, all being damaged, to the start."""
        to = data.draw(st.sampled_from([0, *self.saved]))
        before = self.version
        back = self.buffer.fall_back(to, before)
        assert back.version == before + 1
        assert self.buffer.fall_back(to, before).version == back.version
        self.version = back.version
        self.saved = [v for v in self.saved if v <= to] or [0]
        self.trained = {g: v for g, v in self.trained.items() if v < to}
        self.leased = []

    @rule()
    def controller_dies(self) -> None:
        found = self.buffer.recover()
        assert found.next_id == len(self.admitted) + 1 and found.newest_version == self.version
        assert found.num_damaged == 0

    @precondition(lambda self: not self.leased)
    @rule()
    def commit_without_lease_is_refused(self) -> None:
        with pytest.raises(LedgerError):
            self.buffer.commit(self.version)

    @invariant()
    def none_lost(self) -> None:
        counts = self.buffer.ledger.counts()
        assert sum(counts.values()) == len(self.admitted)
        assert sum(self.buffer.ledger.drops().values()) == counts[S.DROPPED]

    @invariant()
    def totals_are_those_of_the_groups(self) -> None:
        ledger = self.buffer.ledger
        entries = [e for state in GroupState for e in ledger.entries(state)]
        assert {s: n for s, n in ledger.counts().items() if n} == Counter(e.state for e in entries)
        assert {r: n for r, n in ledger.drops().items() if n} == Counter(e.reason for e in entries if e.reason)
        assert ledger.num_tokens() == sum(e.num_tokens or 0 for e in entries)
        assert sum(ledger.num_admitted().values()) == len(entries)

    @invariant()
    def none_trained_twice(self) -> None:
        """And each on the line of the learner, every step of which has its groups."""
        assert {e.group_id: e.learner_version for e in self.buffer.ledger.entries(S.TRAINED)} == self.trained
        line = self.buffer.ledger.versions.lineage(self.version)
        stepped = [v for s in line.stretches for v in range(s.first, s.last)]
        assert sorted(self.trained.values()) == sorted(stepped * self.GROUPS_PER_STEP)
        assert line.step == len(stepped)

    @invariant()
    def capacity_rule_kept(self) -> None:
        counts = self.buffer.ledger.counts()
        live = sum(counts.values()) - counts[S.DROPPED]
        assert self.buffer.capacity(self.version, num_idle=live) <= self.NUM_STEPS * self.GROUPS_PER_STEP
        assert live <= self.NUM_STEPS * self.GROUPS_PER_STEP

    def teardown(self) -> None:
        self.buffer.end_run()
        counts = self.buffer.ledger.counts()
        assert counts[S.TRAINED] + counts[S.DROPPED] == len(self.admitted)
        self.buffer.ledger.close()


RingMachine.TestCase.settings = settings(
    max_examples=80, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
test_any_interleaving = RingMachine.TestCase


def test_the_oldest_version_within_a_staleness() -> None:
    """Versions 4 and 5 are abandoned: 6 is 3 under a new number, and 7 the step after it."""
    for line in (Lineage.unbroken(9), Lineage((Stretch(0, 3, 0), Stretch(6, 8, 3)))):
        versions = [v for s in line.stretches for v in range(s.first, s.last + 1)]
        ages = line.staleness(np.array(versions)).tolist()
        for max_staleness in range(line.step + 3):
            expected = min(v for v, age in zip(versions, ages, strict=True) if age <= max_staleness)
            assert line.oldest_within(max_staleness) == expected


def test_capacity_is_the_formula() -> None:
    def room(eta: int, k: int, live: int) -> int:
        return staleness.capacity(max_staleness=eta, step=k, groups_per_step=8, num_live=live)

    assert room(0, 0, 0) == 8
    assert room(0, 0, 8) == 0
    assert room(0, 1, 8) == 8
    assert room(3, 2, 20) == 6 * 8 - 20
    assert room(0, 0, 99) == 0


def test_lease_takes_the_oldest_and_returns_what_was_stored() -> None:
    buffer = make_buffer()
    ids = to_ready(buffer, 3)
    summary, lease = buffer.lease(0)
    assert summary is not None and lease is not None
    assert [g.group_id for g in lease.groups] == ids[:2]
    assert lease.groups[0].rollouts[1].versions().tolist() == [0, 0, 0]
    buffer.commit(0)
    assert buffer.lease(1) == (None, None)  # one is left, two are a batch


def test_expiry_has_a_reason_and_makes_room() -> None:
    buffer = make_buffer()
    to_ready(buffer, 4)
    assert None not in buffer.lease(0)
    buffer.commit(0)
    for version in (1, 2):  # two steps without these
        buffer.ledger.versions.add_step(version)
    before = buffer.capacity(3)
    assert buffer.lease(3) == (None, None)  # the other two are 3 steps old, the cap is 1
    assert buffer.ledger.drops()[DropReason.STALE] == 2
    assert buffer.capacity(3) == before + 2


def test_on_stale_train_keeps_stragglers() -> None:
    buffer = make_buffer(on_stale="train")
    to_ready(buffer, 2)
    for version in range(9):
        buffer.ledger.versions.add_step(version)
    assert None not in buffer.lease(9)


def test_everything_is_there_again_after_a_restart(tmp_path: Path) -> None:
    buffer = make_buffer(tmp_path / "l.sqlite")
    ids = to_ready(buffer, 3)
    _, before = buffer.lease(0)
    buffer.ledger.close()
    again = make_buffer(tmp_path / "l.sqlite")
    _, lease = again.lease(0)  # what was leased comes again
    assert before is not None and lease is not None
    assert [g.group_id for g in lease.groups] == ids[:2]
    np.testing.assert_array_equal(
        lease.groups[0].rollouts[0].behavior_logprobs, before.groups[0].rollouts[0].behavior_logprobs
    )


def test_falling_back_trains_again_what_is_near_and_generates_again_what_is_not() -> None:
    buffer = make_buffer()
    for version in (0, 1):
        to_ready(buffer, 2, version)
        assert None not in buffer.lease(version)
        buffer.commit(version)
    to_ready(buffer, 2, 1)  # with tokens of version 2
    assert buffer.absorbed(1) == 2  # the checkpoint of version 1 has learnt from the first two
    back = buffer.fall_back(1, known=2)
    # version 2 is abandoned; groups 3 and 4, of version 1, are trained on again
    assert (back.version, back.step, back.num_ready, back.num_pending) == (3, 1, 2, 2)
    assert buffer.ledger.versions.lineage(3) == Lineage((Stretch(0, 1, 0), Stretch(3, 3, 1)))
    assert [i for i, _ in buffer.pending()] == [5, 6]
    assert buffer.capacity(3, num_idle=2) == 2  # (1 + 1 + 1)·2 − 4, so that both may start


def test_falling_back_keeps_groups_whose_tokens_are_all_older() -> None:
    buffer = make_buffer(max_staleness=4)
    ids = to_ready(buffer, 4)
    for version in (0, 1):
        assert None not in buffer.lease(version)
        buffer.commit(version)
    back = buffer.fall_back(1, known=2)
    assert (back.num_ready, back.num_pending) == (2, 0)
    summary, lease = buffer.lease(3)
    assert summary is not None and lease is not None and [g.group_id for g in lease.groups] == ids[2:]
    assert summary.metrics["buffer/group_staleness_max"] == 1  # steps, though versions are 3 apart


def test_versions_are_issued_once() -> None:
    ledger = Ledger(":memory:")
    ledger.versions.add_step(0)
    with pytest.raises(LedgerError, match="version 1 cannot follow 0: the newest is 1"):
        ledger.versions.add_step(0)
    assert ledger.versions.add_fall_back(0) == 2
    with pytest.raises(LedgerError, match="version 7 was never issued"):
        ledger.versions.lineage(7)


def test_a_ledger_has_one_owner(tmp_path: Path) -> None:
    first = Ledger(tmp_path / "l.sqlite")
    second = Ledger(tmp_path / "l.sqlite")
    with pytest.raises(LedgerError, match="another run has opened this ledger since"):
        first.admit(1, [Query("q", "p", "a")], 0)
    assert second.admit(1, [Query("q", "p", "a")], 0) == [1]


def test_a_full_disk_is_told_and_changes_nothing(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l.sqlite")
    ledger.admit(1, [Query("q", "p", "a")], 0)
    pages = ledger._db.execute("PRAGMA page_count").fetchone()[0]
    ledger._db.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(DiskFull, match="disk is full"):
        ledger.admit(2, [Query("q", "p" * 100_000, "a")], 0)
    assert ledger.next_id() == 2
    ledger._db.execute("PRAGMA max_page_count = 100000")
    assert ledger.admit(2, [Query("q", "p" * 100_000, "a")], 0) == [2]


def test_every_forbidden_transition_is_refused() -> None:
    for start in GroupState:
        for to in set(GroupState) - TRANSITIONS[start] - {S.READY, start}:
            ledger = Ledger(":memory:")
            (group_id,) = ledger.admit(1, [Query("q", "p", "a")], 0)
            ledger._db.execute("UPDATE groups SET state = ?", (start,))
            with pytest.raises(LedgerError, match=f"group {group_id} is {start} and may not become {to}"):
                ledger.move([group_id], to, reason=DropReason.STALE if to is S.DROPPED else None)
            assert ledger.counts()[start] == 1


def test_moves_are_all_or_none() -> None:
    ledger = Ledger(":memory:")
    a, b = ledger.admit(1, [Query("a", "p", "a"), Query("b", "p", "b")], 0)
    ledger.move([b], S.DROPPED, reason=DropReason.STALE)
    with pytest.raises(LedgerError):
        ledger.move([a, b], S.READY)
    assert ledger.counts()[S.PENDING] == 1


def test_a_drop_needs_a_reason_and_nothing_else_has_one() -> None:
    ledger = Ledger(":memory:")
    (a,) = ledger.admit(1, [Query("a", "p", "a")], 0)
    with pytest.raises(LedgerError, match="reason"):
        ledger.move([a], S.DROPPED)
    with pytest.raises(LedgerError, match="reason"):
        ledger.move([a], S.READY, reason=DropReason.STALE)
    assert ledger.queries(S.PENDING) == [(a, Query("a", "p", "a"))]


def test_unscored_groups_are_not_ready() -> None:
    buffer = make_buffer()
    (i,) = buffer.admit(1, [Query("a", "p", "a")], 0)
    with pytest.raises(ValueError, match="without a score"):
        buffer.ready(group(i, rollout(reward=None)))
    assert buffer.ledger.counts()[S.PENDING] == 1


def test_bytes_and_back() -> None:
    given = replace(rollout(2, 4), sampled=np.array([True, False]))
    before = group(7, rollout(4, 3, newer_from=2), rollout(1, 5, reward=None), given)
    after = serialization.from_bytes(serialization.to_bytes(before))
    assert after.query == before.query
    assert [r.spans for r in after.rollouts] == [r.spans for r in before.rollouts]
    assert [r.score for r in after.rollouts] == [r.score for r in before.rollouts]
    assert [r.text for r in after.rollouts] == [r.text for r in before.rollouts]
    for a, b in zip(after.rollouts, before.rollouts, strict=True):
        np.testing.assert_array_equal(a.token_ids, b.token_ids)
        np.testing.assert_array_equal(a.behavior_logprobs, b.behavior_logprobs)
        np.testing.assert_array_equal(a.is_sampled(), b.is_sampled())
    assert [r.sampled is None for r in after.rollouts] == [True, True, False]
    assert after.rollouts[2].versions().tolist() == [4, -1]
    assert after.versions() == {3, 4, 5}


def test_rollouts_are_freed_that_no_checkpoint_needs(tmp_path: Path) -> None:
    buffer = make_buffer(tmp_path / "ledger.sqlite")
    ids = to_ready(buffer, 4)
    buffer.lease(0)
    buffer.commit(0)
    buffer.ledger.versions.add_step(1)
    assert buffer.lease(2) == (None, None), "the other two have expired"
    assert buffer.absorbed(1) == 2
    assert [buffer.ledger.has_payload(i) for i in ids] == [False, False, True, True]
    assert (buffer.absorbed(2), buffer.absorbed(3)) == (0, 2)


def test_a_ledger_of_another_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    ledger = Ledger(path)
    ledger._db.execute("PRAGMA user_version=7")
    ledger.close()
    with pytest.raises(LedgerError, match=r"is a ledger of version 7, and this quatro_ray reads version 1; continue"):
        Ledger(path)
