"""The ledger's tables, and their version."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from quatro_ray.errors import LedgerError
from quatro_ray.replay.migration import migrate
from quatro_ray.replay.segments import Segments
from quatro_ray.replay.versions import SCHEMA as VERSIONS

VERSION = 1
"""The version of the tables; the database has it as its `user_version`."""

# A commit writes whole pages, and most commits change a few rows
_PAGE_BYTES = 512

# SQLite writes a row as a whole: beside its state, a query would be written again by every change of it
_TABLES = """
CREATE TABLE groups (
    group_id INTEGER PRIMARY KEY,    -- chosen by the caller, so that admitting again changes nothing
    state TEXT NOT NULL,
    reason TEXT,                     -- of a drop
    learner_version INTEGER,         -- of a lease or an expiry: the version that the step trains from
    admitted_version INTEGER NOT NULL,
    oldest_version INTEGER,          -- of its tokens, once generated
    newest_version INTEGER,
    num_tokens INTEGER,              -- response tokens, once generated
    mean_reward REAL,                -- once verified
    admitted_at REAL NOT NULL,       -- seconds since the epoch
    ready_at REAL
);
-- of the few groups that are live, so that the indexes stay small
CREATE INDEX pending ON groups (group_id) WHERE state = 'pending';
CREATE INDEX ready ON groups (oldest_version, group_id) WHERE state = 'ready';
CREATE INDEX leased ON groups (group_id) WHERE state = 'leased';
CREATE INDEX by_learner_version ON groups (learner_version) WHERE learner_version IS NOT NULL;
CREATE TABLE queries (
    group_id INTEGER PRIMARY KEY,
    query TEXT NOT NULL              -- JSON
);
CREATE TABLE rollouts (              -- of the groups whose rollouts are kept: replay/segments.py:Location
    group_id INTEGER PRIMARY KEY,
    segment TEXT NOT NULL,
    start INTEGER NOT NULL,
    length INTEGER NOT NULL,
    checksum INTEGER NOT NULL
);
CREATE TABLE owner (epoch INTEGER NOT NULL);
"""

_TALLY = """
CREATE TABLE tally (                 -- so that counting takes the same time however many groups there are
    kind TEXT NOT NULL,              -- state, reason, source: number of groups; tokens: of all groups
    name TEXT NOT NULL,
    total INTEGER NOT NULL,
    PRIMARY KEY (kind, name)
) WITHOUT ROWID;
INSERT INTO tally VALUES ('tokens', '', 0);
CREATE TRIGGER tally_source AFTER INSERT ON queries BEGIN
    INSERT INTO tally VALUES ('source', json_extract(NEW.query, '$.source'), 1)
        ON CONFLICT DO UPDATE SET total = total + 1;
END;
CREATE TRIGGER tally_admission AFTER INSERT ON groups BEGIN
    INSERT INTO tally VALUES ('state', NEW.state, 1) ON CONFLICT DO UPDATE SET total = total + 1;
END;
CREATE TRIGGER tally_state AFTER UPDATE OF state ON groups WHEN NEW.state <> OLD.state BEGIN
    INSERT INTO tally VALUES ('state', OLD.state, -1), ('state', NEW.state, 1)
        ON CONFLICT DO UPDATE SET total = total + excluded.total;
END;
CREATE TRIGGER tally_reason AFTER UPDATE OF reason ON groups WHEN NEW.reason IS NOT OLD.reason BEGIN
    INSERT INTO tally VALUES ('reason', NEW.reason, 1) ON CONFLICT DO UPDATE SET total = total + 1;
END;
CREATE TRIGGER tally_tokens AFTER UPDATE OF num_tokens ON groups BEGIN
    UPDATE tally SET total = total + NEW.num_tokens - COALESCE(OLD.num_tokens, 0) WHERE kind = 'tokens';
END;
"""


def prepare(db: sqlite3.Connection, path: Path | str, segments: Segments) -> None:
    """Create the tables in a new database, or bring those of version 0 to the present form.

    Args:
        db: the database.
        path: its file, for messages.
        segments: takes the rollouts of a ledger of version 0, which had them in the database.

    Raises:
        LedgerError: the database is not a ledger of a version that can be read.
    """
    db.execute(f"PRAGMA page_size={_PAGE_BYTES}")
    db.execute("PRAGMA journal_mode=WAL")
    with db:  # all of it, or nothing
        db.execute("BEGIN IMMEDIATE")
        check_version(db, path)
        version = _version(db)
        if version is None:
            create_tables(db)
            _run(db, VERSIONS)
        elif version == 0:
            migrate(db, segments, create_tables)
        db.execute(f"PRAGMA user_version={VERSION}")


def create_tables(db: sqlite3.Connection) -> None:
    """Create all tables but that of the versions, inside a transaction."""
    _run(db, _TABLES + _TALLY)


def check_version(db: sqlite3.Connection, path: Path | str) -> None:
    """Raise LedgerError if the database has tables, and they are not those of a version that can be read."""
    version = _version(db)
    if version not in (None, 0, VERSION) or (version == 0 and not _has_table(db, "payloads")):
        raise LedgerError(
            f"{path} is a ledger of version {version}, and this quatro_ray reads version {VERSION}; continue the run "
            "with the quatro_ray that began it, or begin a new one in another run.dir"
        )


def _version(db: sqlite3.Connection) -> int | None:
    """Return the version of the tables; None if there are none."""
    if not db.execute("SELECT 1 FROM sqlite_master").fetchone():
        return None
    return int(db.execute("PRAGMA user_version").fetchone()[0])


def _has_table(db: sqlite3.Connection, name: str) -> bool:
    return db.execute("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = ?", (name,)).fetchone() is not None


def _run(db: sqlite3.Connection, script: str) -> None:
    """Run the statements inside the transaction, which `executescript` would commit."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            db.execute(statement)
            statement = ""
