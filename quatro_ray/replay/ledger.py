"""The durable state of every group, in SQLite: each change is one transaction, and only TRANSITIONS are allowed."""

from __future__ import annotations

import json
import logging
import sqlite3
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path

from quatro_ray.errors import CheckpointError, DiskFull, LedgerError, LedgerLocked
from quatro_ray.files import sync
from quatro_ray.replay import schema
from quatro_ray.replay.segments import Location, Segments
from quatro_ray.replay.versions import Versions
from quatro_ray.types import DropReason, GroupState, Query

_logger = logging.getLogger(__name__)

S = GroupState
TRANSITIONS: dict[GroupState, frozenset[GroupState]] = {
    S.PENDING: frozenset({S.READY, S.DROPPED}),
    S.READY: frozenset({S.LEASED, S.PENDING, S.DROPPED}),
    S.LEASED: frozenset({S.TRAINED, S.READY, S.PENDING, S.DROPPED}),
    S.TRAINED: frozenset({S.READY, S.PENDING}),  # if the learner falls back to an older checkpoint
    S.DROPPED: frozenset(),
}
"""The allowed moves. A move to the present state changes nothing: it is a call repeated after its answer was lost."""


@dataclass(frozen=True)
class Entry:
    """One row of the ledger, without its payload.

    Attributes:
        learner_version: the version that the step of its lease trains from, or for which it was too old when it
            expired; None before either.
        admitted_version: the version of the engines at admission.
        oldest_version: version of its oldest token; None until it is ready.
        newest_version: version of its newest token; None until it is ready.
        num_tokens: response tokens of all rollouts; None until it is ready.
        admitted_at: seconds since the epoch.
        ready_at: seconds since the epoch; None until it is ready.
    """

    group_id: int
    state: GroupState
    reason: DropReason | None
    learner_version: int | None
    admitted_version: int
    oldest_version: int | None
    newest_version: int | None
    num_tokens: int | None
    mean_reward: float | None
    admitted_at: float
    ready_at: float | None


_ENTRY = (
    "group_id, state, reason, learner_version, admitted_version, oldest_version, newest_version, num_tokens, "
    "mean_reward, admitted_at, ready_at"
)


class Ledger:
    """The ledger of a run.

    Methods raise LedgerError for a transition that is not allowed, and then change nothing. Opening the ledger takes
    ownership by a new fencing token, `epoch`: a process that had it open before can no longer write.

    Args:
        path: file of the database, which is created if it does not exist. Rollouts are in a folder beside it, with the
            suffix `.rollouts`. ":memory:" for a ledger that is not kept.
        clock: returns seconds since the epoch.
    """

    def __init__(self, path: Path | str, clock: Callable[[], float] = time.time) -> None:
        # a Ray actor creates it in one thread and calls it from another, one call at a time
        self._db = sqlite3.connect(path, schema.LOCK_DEADLINE_S, isolation_level=None, check_same_thread=False)
        folder = None if path == ":memory:" else Path(path).with_suffix(".rollouts")
        with closing(Segments(folder, 0)) as segments:
            schema.prepare(self._db, path, segments)
        self._db.execute("PRAGMA synchronous=NORMAL")
        self._db.execute("PRAGMA wal_autocheckpoint=8000")  # pages; each is written once a checkpoint
        self._clock = clock
        self.versions = Versions(self._db)
        self._epoch = self._take_over()
        self._segments = Segments(folder, self._epoch)

    def _take_over(self) -> int:
        self._db.execute("BEGIN IMMEDIATE")
        epoch = int(self._db.execute("SELECT COALESCE(MAX(epoch), 0) + 1 FROM owner").fetchone()[0])
        self._db.execute("DELETE FROM owner")
        self._db.execute("INSERT INTO owner VALUES (?)", (epoch,))
        self._db.execute("COMMIT")
        return epoch

    @property
    def times_opened(self) -> int:
        """Number of times that the ledger was opened, including this one."""
        return self._epoch

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Make all changes inside the `with`, or none of them; transactions may be nested.

        Raises:
            LedgerError: another process has opened the ledger since.
            DiskFull: the disk is full; nothing was changed, and the call may be repeated.
            LedgerLocked: another program has locked the database for a minute; as for DiskFull.
        """
        if self._db.in_transaction:  # nested: the outer transaction commits
            yield
            return
        try:
            self._db.execute("BEGIN IMMEDIATE")
            if self._db.execute("SELECT epoch FROM owner").fetchone()[0] != self._epoch:
                raise LedgerError("another run has opened this ledger since; this run can no longer write to it")
            yield
            self._db.execute("COMMIT")
        except BaseException as error:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            _raise_if_blocked(error)
            raise

    def admit(self, first_id: int, queries: Sequence[Query], version: int) -> list[int]:
        """Add pending groups numbered from `first_id` and return their ids; existing groups are not changed."""
        group_ids = list(range(first_id, first_id + len(queries)))
        with self.transaction():
            self._db.executemany(
                "INSERT OR IGNORE INTO groups (group_id, state, admitted_version, admitted_at) VALUES (?, ?, ?, ?)",
                [(group_id, S.PENDING, version, self._clock()) for group_id in group_ids],
            )
            self._db.executemany(
                "INSERT OR IGNORE INTO queries (group_id, query) VALUES (?, ?)",
                [(i, json.dumps(vars(query))) for i, query in zip(group_ids, queries, strict=True)],
            )
        return group_ids

    def next_id(self) -> int:
        """Return the id of the next group; ids start at 1."""
        return int(self._db.execute("SELECT COALESCE(MAX(group_id), 0) + 1 FROM groups").fetchone()[0])

    def num_tokens(self) -> int:
        """Return the response tokens of all groups that were ever ready; a group made again counts once."""
        return self._tally("tokens").get("", 0)

    def num_admitted(self) -> dict[str, int]:
        """Return the number of groups by the source of their queries."""
        return self._tally("source")

    def _tally(self, kind: str) -> dict[str, int]:
        """Return the totals of a kind that are not 0; replay/schema.py keeps them."""
        return dict(self._db.execute("SELECT name, total FROM tally WHERE kind = ? AND total <> 0", (kind,)))

    def move(
        self,
        group_ids: Iterable[int],
        to: GroupState,
        *,
        reason: DropReason | None = None,
        learner_version: int | None = None,
    ) -> None:
        """Move all of the groups to a state, or none of them.

        Args:
            group_ids: groups that exist; those that are in the state already are not changed.
            to: the new state, allowed by TRANSITIONS.
            reason: required for a drop, and only for a drop.
            learner_version: for a lease, the version that the step trains from. If None, it is not changed.

        Raises:
            LedgerError: a group does not exist or may not go to this state, or `reason` does not fit the state.
        """
        if (to is S.DROPPED) != (reason is not None):
            raise LedgerError(f"a drop, and only a drop, has a reason; got state {to} with reason {reason}")
        with self.transaction():
            for group_id in group_ids:
                if self._is_new(group_id, to):
                    self._db.execute(
                        "UPDATE groups SET state = ?, reason = ?, learner_version = COALESCE(?, learner_version) "
                        "WHERE group_id = ?",
                        (to, reason, learner_version, group_id),
                    )

    def store(
        self,
        group_id: int,
        payload: bytes,
        *,
        oldest_version: int,
        newest_version: int,
        num_tokens: int,
        mean_reward: float,
    ) -> None:
        """Move a pending group to ready, and store its rollouts.

        Args:
            group_id: a pending group; one that is ready, or has been since, is not changed.
            payload: the group as bytes (replay/serialization.py).
            oldest_version: version of its oldest token.
            newest_version: version of its newest token.
            num_tokens: response tokens of all rollouts.
            mean_reward: mean over its rollouts.

        Raises:
            LedgerError: the group does not exist or was dropped.
            DiskFull: the disk is full; nothing was changed, and the call may be repeated.
        """
        with self.transaction():
            state = self._state(group_id)
            if state is S.DROPPED:
                raise LedgerError(f"group {group_id} is {state} and may not become {S.READY}")
            if state is S.PENDING:
                at = self._segments.append(payload)
                self._db.execute(
                    "INSERT OR REPLACE INTO rollouts (group_id, segment, start, length, checksum) "
                    "VALUES (?, ?, ?, ?, ?)",
                    (group_id, *astuple(at)),
                )
                self._db.execute(
                    "UPDATE groups SET state = ?, oldest_version = ?, newest_version = ?, num_tokens = ?, "
                    "mean_reward = ?, ready_at = ? WHERE group_id = ?",
                    (S.READY, oldest_version, newest_version, num_tokens, mean_reward, self._clock(), group_id),
                )

    def _is_new(self, group_id: int, to: GroupState) -> bool:
        """Return False if the group is in that state already; raise LedgerError if it may not go there."""
        state = self._state(group_id)
        if state != to and to not in TRANSITIONS[state]:
            raise LedgerError(f"group {group_id} is {state} and may not become {to}")
        return state != to

    def _state(self, group_id: int) -> GroupState:
        row = self._db.execute("SELECT state FROM groups WHERE group_id = ?", (group_id,)).fetchone()
        if row is None:
            raise LedgerError(f"group {group_id} does not exist")
        return GroupState(row[0])

    def entries(self, state: GroupState, limit: int = -1) -> list[Entry]:
        """Return at most `limit` groups in a state (-1: all), by the version of the oldest token, then by id."""
        return self._entries(f"state = '{state}' ORDER BY oldest_version, group_id LIMIT ?", (limit,))

    def of_learner(self, state: GroupState, version: int, *, or_later: bool = False) -> list[Entry]:
        """Return the groups in a state whose lease or expiry has this `learner_version`, in the order of `entries`.

        Args:
            state: the state.
            version: the learner's version.
            or_later: return those of later versions too.
        """
        comparison = ">=" if or_later else "="
        return self._entries(
            f"state = ? AND learner_version {comparison} ? ORDER BY oldest_version, group_id", (state, version)
        )

    def older_than(self, version: int) -> list[Entry]:
        """Return the ready groups whose oldest token is of an earlier version, in the order of `entries`."""
        return self._entries(
            f"state = '{S.READY}' AND oldest_version < ? ORDER BY oldest_version, group_id", (version,)
        )

    def _entries(self, where: str, values: tuple[str | int, ...]) -> list[Entry]:
        rows = self._db.execute(f"SELECT {_ENTRY} FROM groups WHERE {where}", values)
        return [Entry(r[0], GroupState(r[1]), DropReason(r[2]) if r[2] else None, *r[3:]) for r in rows]

    def payload(self, group_id: int) -> bytes:
        """Return the stored rollouts of a group, or raise LedgerError if there are none or they are damaged."""
        row = self._db.execute(
            "SELECT segment, start, length, checksum FROM rollouts WHERE group_id = ?", (group_id,)
        ).fetchone()
        if row is None:
            raise LedgerError(f"group {group_id} has no stored rollouts")
        try:
            return self._segments.read(Location(*row))
        except LedgerError as error:
            raise LedgerError(
                f"the rollouts of group {group_id} cannot be read: {error}; check the disk, then rerun with "
                "run.resume=auto: the group will be generated again"
            ) from error

    def has_payload(self, group_id: int) -> bool:
        """Return whether the rollouts of a group are stored."""
        return self._db.execute("SELECT 1 FROM rollouts WHERE group_id = ?", (group_id,)).fetchone() is not None

    def forget_damaged(self) -> int:
        """Read the rollouts of all groups, and forget those that are damaged or missing.

        Ready and leased groups without rollouts become pending.

        Returns:
            The number of groups whose rollouts were forgotten.
        """
        with self.transaction():
            stored = self._db.execute("SELECT group_id, segment, start, length, checksum FROM rollouts").fetchall()
            damaged = [group_id for group_id, *location in stored if not self._is_whole(Location(*location))]
            self._db.executemany("DELETE FROM rollouts WHERE group_id = ?", [(i,) for i in damaged])
            live = [i for i in damaged if self._state(i) in (S.READY, S.LEASED)]
            self.move(live, S.PENDING)
        return len(damaged)

    def _is_whole(self, location: Location) -> bool:
        try:
            self._segments.read(location)
        except LedgerError as error:
            _logger.warning("%s", error)
            return False
        return True

    def counts(self) -> dict[GroupState, int]:
        """Return the number of groups for every state."""
        found = self._tally("state")
        return {state: found.get(state, 0) for state in GroupState}

    def drops(self) -> dict[DropReason, int]:
        """Return the number of dropped groups for every reason."""
        found = self._tally("reason")
        return {reason: found.get(reason, 0) for reason in DropReason}

    def queries(self, state: GroupState) -> list[tuple[int, Query]]:
        """Return ids and queries of the groups in a state, by id."""
        joined = "groups JOIN queries USING (group_id)"
        rows = self._db.execute(f"SELECT group_id, query FROM {joined} WHERE state = '{state}' ORDER BY group_id")
        return [(group_id, Query(**json.loads(query))) for group_id, query in rows]

    def forget_payloads(self, version: int, kept_steps: Collection[int] = ()) -> int:
        """Free the rollouts of groups trained or expired before `version`, or otherwise dropped; return their number.

        A fall-back to a version older than that generates the trained ones again.

        Args:
            version: the policy version of the oldest checkpoint.
            kept_steps: optimiser steps whose groups are kept all the same.
        """
        kept = ",".join(str(step - 1) for step in kept_steps)
        with self.transaction():
            # CROSS JOIN keeps the order: the rollouts that are left are few, the trained groups are not
            count = self._db.execute(
                "DELETE FROM rollouts WHERE group_id IN (SELECT group_id FROM rollouts "
                "CROSS JOIN groups USING (group_id) WHERE state IN (?, ?) AND COALESCE(learner_version, -1) < ? "
                f"AND COALESCE(learner_version, -1) NOT IN (SELECT version FROM versions WHERE step IN ({kept})))",
                (S.TRAINED, S.DROPPED, version),
            ).rowcount
        self._segments.keep({name for (name,) in self._db.execute("SELECT DISTINCT segment FROM rollouts")})
        return count

    def flush(self) -> None:
        """Write all commits to the disk, so that they survive a crash of the machine, not only of the process.

        Raises:
            DiskFull: the disk is full; the call may be repeated.
        """
        self._segments.flush()
        self._db.execute("PRAGMA synchronous=FULL")  # a commit now syncs the log, with all commits before it
        try:
            with self.transaction():
                self._db.execute("UPDATE owner SET epoch = epoch")
        finally:
            self._db.execute("PRAGMA synchronous=NORMAL")

    def snapshot(self, path: Path) -> None:
        """Write a copy of the database, as it is now, to a new file; the rollouts are not in it.

        Raises:
            CheckpointError: the copy cannot be written.
        """
        try:
            path.unlink(missing_ok=True)
            with closing(sqlite3.connect(path)) as copy:
                copy.execute("PRAGMA synchronous=OFF")  # it is synced below, once
                self._db.backup(copy)
            sync(path)
        except (sqlite3.OperationalError, OSError) as error:
            raise CheckpointError(f"{path}: the ledger cannot be copied there ({error})") from error

    def close(self) -> None:
        """Close the database."""
        self._db.close()
        self._segments.close()


def _raise_if_blocked(error: BaseException) -> None:
    if isinstance(error, sqlite3.OperationalError) and "disk is full" in str(error):
        raise DiskFull(f"the ledger cannot be written: {error}") from error
    if isinstance(error, sqlite3.OperationalError) and "locked" in str(error):
        raise LedgerLocked(
            f"the ledger has been locked by another program for {schema.LOCK_DEADLINE_S:g} s; end that program"
        ) from error
