"""Brings a ledger of version 0 to the present form. It had queries and rollouts in its tables, and two more states."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from dataclasses import astuple

from quatro_ray.replay.segments import Segments

_COLUMNS = (
    "reason, learner_version, admitted_version, oldest_version, newest_version, num_tokens, mean_reward, admitted_at, "
    "ready_at"
)
_REPLACED = """
DROP TRIGGER tally_admission
DROP TRIGGER tally_state
DROP TRIGGER tally_reason
DROP TRIGGER tally_tokens
DROP TABLE tally
DROP INDEX by_age
DROP INDEX by_learner_version
ALTER TABLE groups RENAME TO old_groups
ALTER TABLE owner RENAME TO old_owner
ALTER TABLE versions ADD COLUMN digest INTEGER
"""
_COPIED = f"""
INSERT INTO owner SELECT epoch FROM old_owner
INSERT INTO groups (group_id, state, {_COLUMNS}) SELECT group_id, state, {_COLUMNS} FROM old_groups
UPDATE groups SET state = 'pending' WHERE state IN ('generating', 'verifying')
INSERT INTO queries (group_id, query) SELECT group_id, query FROM old_groups
INSERT INTO tally SELECT 'reason', reason, COUNT(*) FROM groups WHERE reason NOT NULL GROUP BY reason
UPDATE tally SET total = (SELECT COALESCE(SUM(num_tokens), 0) FROM groups) WHERE kind = 'tokens'
DROP TABLE old_groups
DROP TABLE old_owner
"""


def migrate(db: sqlite3.Connection, segments: Segments, create_tables: Callable[[sqlite3.Connection], None]) -> None:
    """Replace the tables of version 0, inside a transaction.

    Args:
        db: the database.
        segments: takes the rollouts.
        create_tables: creates the tables of the present version.
    """
    _run(db, _REPLACED)
    create_tables(db)
    _run(db, _COPIED)
    for group_id, payload in db.execute("SELECT group_id, payload FROM payloads"):
        db.execute(
            "INSERT INTO rollouts (group_id, segment, start, length, checksum) VALUES (?, ?, ?, ?, ?)",
            (group_id, *astuple(segments.append(payload))),
        )
    segments.flush()
    db.execute("DROP TABLE payloads")


def _run(db: sqlite3.Connection, statements: str) -> None:
    for statement in statements.strip().splitlines():
        db.execute(statement)
