"""The ledger's tables, and the changes that bring an older ledger to them."""

from __future__ import annotations

import sqlite3

from quatro_ray.replay.versions import SCHEMA as VERSIONS

_GROUPS = """
CREATE TABLE IF NOT EXISTS groups (
    group_id INTEGER PRIMARY KEY,    -- chosen by the caller, so that admitting again changes nothing
    query TEXT NOT NULL,             -- JSON
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
CREATE TABLE IF NOT EXISTS owner (epoch INTEGER NOT NULL);
"""

# SQLite writes a row as a whole: beside its rollouts, every change of a group's state would write them again
_PAYLOADS = """
CREATE TABLE IF NOT EXISTS payloads (
    group_id INTEGER PRIMARY KEY,
    payload BLOB NOT NULL            -- replay/serialization.py, from ready on
);
"""

_INDEXES = """
DROP INDEX IF EXISTS by_state;
CREATE INDEX IF NOT EXISTS by_age ON groups (state, oldest_version, group_id);
CREATE INDEX IF NOT EXISTS by_learner_version ON groups (state, learner_version) WHERE learner_version IS NOT NULL;
"""

_TALLY = """
CREATE TABLE tally (                 -- so that counting takes the same time however many groups there are
    kind TEXT NOT NULL,              -- state, reason, source: number of groups; tokens: of all groups
    name TEXT NOT NULL,
    total INTEGER NOT NULL,
    PRIMARY KEY (kind, name)
) WITHOUT ROWID;
INSERT INTO tally SELECT 'state', state, COUNT(*) FROM groups GROUP BY state;
INSERT INTO tally SELECT 'reason', reason, COUNT(*) FROM groups WHERE reason IS NOT NULL GROUP BY reason;
INSERT INTO tally SELECT 'source', json_extract(query, '$.source'), COUNT(*) FROM groups GROUP BY 2;
INSERT INTO tally SELECT 'tokens', '', COALESCE(SUM(num_tokens), 0) FROM groups;
CREATE TRIGGER tally_admission AFTER INSERT ON groups BEGIN
    INSERT INTO tally VALUES ('state', NEW.state, 1), ('source', json_extract(NEW.query, '$.source'), 1)
        ON CONFLICT DO UPDATE SET total = total + 1;
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


def prepare(db: sqlite3.Connection) -> None:
    """Create the tables that are missing, and bring those of an older ledger to the present form."""
    db.executescript(_GROUPS + _PAYLOADS + VERSIONS)
    with db:  # all of it, or nothing
        db.execute("BEGIN IMMEDIATE")
        columns = {row[1] for row in db.execute("PRAGMA table_info(groups)")}
        if "step" in columns:  # it always held the learner's version
            db.execute("ALTER TABLE groups RENAME COLUMN step TO learner_version")
        if "payload" in columns:
            db.execute("INSERT OR IGNORE INTO payloads SELECT group_id, payload FROM groups WHERE payload IS NOT NULL")
            db.execute("ALTER TABLE groups DROP COLUMN payload")
        _run(db, _INDEXES)
        if not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'tally'").fetchone():
            _run(db, _TALLY)


def _run(db: sqlite3.Connection, script: str) -> None:
    """Run the statements inside the transaction, which `executescript` would commit."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            db.execute(statement)
            statement = ""
