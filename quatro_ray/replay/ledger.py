"""The durable state of every group: SQLite, one transaction a change, only the transitions that a life allows."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from quatro_ray.errors import LedgerError
from quatro_ray.types import DropReason, GroupState, Query

S = GroupState
TRANSITIONS: dict[GroupState, frozenset[GroupState]] = {
    S.PENDING: frozenset({S.GENERATING, S.DROPPED}),
    S.GENERATING: frozenset({S.VERIFYING, S.PENDING, S.DROPPED}),
    S.VERIFYING: frozenset({S.READY, S.PENDING, S.DROPPED}),
    S.READY: frozenset({S.LEASED, S.DROPPED}),
    S.LEASED: frozenset({S.TRAINED, S.READY, S.DROPPED}),
    S.TRAINED: frozenset({S.READY}),  # the learner fell back to an older checkpoint
    S.DROPPED: frozenset(),
}

_SCHEMA = """
CREATE TABLE IF NOT EXISTS groups (
    group_id INTEGER PRIMARY KEY AUTOINCREMENT,
    query TEXT NOT NULL,             -- JSON
    state TEXT NOT NULL,
    reason TEXT,                     -- of a drop
    step INTEGER,                    -- of a lease: the learner version it is trained from
    admitted_version INTEGER NOT NULL,
    oldest_version INTEGER,          -- of its tokens, once generated
    num_tokens INTEGER,              -- response tokens, once generated
    mean_reward REAL,                -- once verified
    admitted_at REAL NOT NULL,       -- seconds since the epoch
    ready_at REAL,
    payload BLOB                     -- replay/serial.py, from ready on
);
CREATE INDEX IF NOT EXISTS by_state ON groups (state, group_id);
"""


@dataclass(frozen=True)
class Entry:
    """One row, without its payload."""

    group_id: int
    state: GroupState
    reason: DropReason | None
    step: int | None
    admitted_version: int
    oldest_version: int | None
    num_tokens: int | None
    mean_reward: float | None
    admitted_at: float
    ready_at: float | None


_ENTRY = (
    "group_id, state, reason, step, admitted_version, oldest_version, num_tokens, mean_reward, admitted_at, ready_at"
)


class Ledger:
    """Methods raise LedgerError for a transition that is not allowed, and then change nothing."""

    def __init__(self, path: Path | str, clock: Callable[[], float] = time.time) -> None:
        self._db = sqlite3.connect(path, isolation_level=None)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=NORMAL")
        self._db.executescript(_SCHEMA)
        self._clock = clock

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    def admit(self, queries: Sequence[Query], version: int) -> list[int]:
        """New groups in state pending; ids only ever grow, in the order of admission."""
        with self._transaction():
            return [
                int(
                    self._db.execute(
                        "INSERT INTO groups (query, state, admitted_version, admitted_at) VALUES (?, ?, ?, ?)",
                        (json.dumps(asdict(query)), S.PENDING, version, self._clock()),
                    ).lastrowid
                    or 0
                )
                for query in queries
            ]

    def move(
        self, group_ids: Iterable[int], to: GroupState, *, reason: DropReason | None = None, step: int | None = None
    ) -> None:
        """All of the groups, or none.

        Raises:
            LedgerError: a group does not exist or may not go to this state; a drop without a reason.
        """
        if (to is S.DROPPED) != (reason is not None):
            raise LedgerError(f"a drop, and only a drop, has a reason; got state {to} with reason {reason}")
        with self._transaction():
            for group_id in group_ids:
                self._check(group_id, to)
                self._db.execute(
                    "UPDATE groups SET state = ?, reason = ?, step = COALESCE(?, step) WHERE group_id = ?",
                    (to, reason, step, group_id),
                )

    def store(self, group_id: int, payload: bytes, *, oldest_version: int, num_tokens: int, mean_reward: float) -> None:
        """verifying → ready, with everything that training needs."""
        with self._transaction():
            self._check(group_id, S.READY)
            self._db.execute(
                "UPDATE groups SET state = ?, payload = ?, oldest_version = ?, num_tokens = ?, mean_reward = ?, "
                "ready_at = ? WHERE group_id = ?",
                (S.READY, payload, oldest_version, num_tokens, mean_reward, self._clock(), group_id),
            )

    def _check(self, group_id: int, to: GroupState) -> None:
        row = self._db.execute("SELECT state FROM groups WHERE group_id = ?", (group_id,)).fetchone()
        if row is None:
            raise LedgerError(f"group {group_id} does not exist")
        if to not in TRANSITIONS[GroupState(row[0])]:
            raise LedgerError(f"group {group_id} is {row[0]} and may not become {to}")

    def entries(self, state: GroupState, limit: int = -1) -> list[Entry]:
        """Oldest admission first."""
        rows = self._db.execute(
            f"SELECT {_ENTRY} FROM groups WHERE state = ? ORDER BY group_id LIMIT ?", (state, limit)
        )
        return [Entry(r[0], GroupState(r[1]), DropReason(r[2]) if r[2] else None, *r[3:]) for r in rows]

    def payload(self, group_id: int) -> bytes:
        row = self._db.execute("SELECT payload FROM groups WHERE group_id = ?", (group_id,)).fetchone()
        if row is None or row[0] is None:
            raise LedgerError(f"group {group_id} has no stored rollouts")
        return row[0]

    def query(self, group_id: int) -> Query:
        row = self._db.execute("SELECT query FROM groups WHERE group_id = ?", (group_id,)).fetchone()
        if row is None:
            raise LedgerError(f"group {group_id} does not exist")
        return Query(**json.loads(row[0]))

    def counts(self) -> dict[GroupState, int]:
        """Groups by state; every state is there."""
        found = dict(self._db.execute("SELECT state, COUNT(*) FROM groups GROUP BY state"))
        return {state: found.get(state, 0) for state in GroupState}

    def drops(self) -> dict[DropReason, int]:
        found = dict(
            self._db.execute("SELECT reason, COUNT(*) FROM groups WHERE state = ? GROUP BY reason", (S.DROPPED,))
        )
        return {reason: found.get(reason, 0) for reason in DropReason}

    def release_leases(self) -> int:
        """Leased and not committed → ready, as when a learner died in a step. Returns how many."""
        leased = [e.group_id for e in self.entries(S.LEASED)]
        self.move(leased, S.READY)
        return len(leased)

    def fall_back(self, version: int) -> int:
        """The learner continues from the checkpoint of `version`: groups trained from it on become ready again."""
        again = [e.group_id for e in self.entries(S.TRAINED) if e.step is not None and e.step >= version]
        self.move(again, S.READY)
        return len(again)

    def forget_payloads(self, version: int) -> int:
        """Frees the rollouts of groups that a checkpoint of `version` has absorbed: no fall-back needs them."""
        with self._transaction():
            cursor = self._db.execute(
                "UPDATE groups SET payload = NULL WHERE state = ? AND step < ? AND payload IS NOT NULL",
                (S.TRAINED, version),
            )
            return cursor.rowcount

    def close(self) -> None:
        self._db.close()
