"""The ledger's tables, their version, and the checks of a file that holds them."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from zlib import crc32

from quatro_ray.errors import LedgerError, LedgerLocked, LedgerUnreadable
from quatro_ray.replay.migration import migrate
from quatro_ray.replay.segments import Segments
from quatro_ray.replay.versions import SCHEMA as VERSIONS

VERSION = 1
"""The version of the tables; the database has it as its `user_version`."""

LOCK_DEADLINE_S = 60.0
"""Seconds for which another program, such as a backup, may lock the ledger."""

_LOCKED = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
_UNREADABLE = (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_PERM, sqlite3.SQLITE_READONLY)

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
    ready_at REAL,
    digest INTEGER
);
-- of the few groups that are live, so that the indexes stay small
CREATE INDEX pending ON groups (group_id) WHERE state = 'pending';
CREATE INDEX ready ON groups (oldest_version, group_id) WHERE state = 'ready';
CREATE INDEX leased ON groups (group_id) WHERE state = 'leased';
CREATE INDEX by_learner_version ON groups (learner_version) WHERE learner_version IS NOT NULL;
CREATE TABLE queries (
    group_id INTEGER PRIMARY KEY,
    query TEXT NOT NULL,             -- JSON
    digest INTEGER
);
CREATE TABLE rollouts (              -- of the groups whose rollouts are kept: replay/segments.py:Location
    group_id INTEGER PRIMARY KEY,
    segment TEXT NOT NULL,
    start INTEGER NOT NULL,
    length INTEGER NOT NULL,
    checksum INTEGER NOT NULL,
    digest INTEGER
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

_DIGESTED = {
    "groups": "group_id, state, reason, learner_version, admitted_version, oldest_version, newest_version, num_tokens, "
    "mean_reward, admitted_at, ready_at",
    "queries": "group_id, query",
    "rollouts": "group_id, segment, start, length, checksum",
    "versions": "version, parent, step, fell_back",
}
"""The columns whose values `digest` covers, by table; the first one is the key. SQLite has no checksums of its own."""
_TALLIES = {
    "state": "SELECT state, COUNT(*) FROM groups GROUP BY state",
    "reason": "SELECT reason, COUNT(*) FROM groups WHERE reason NOT NULL GROUP BY reason",
    "source": "SELECT json_extract(query, '$.source'), COUNT(*) FROM queries GROUP BY 1",
    "tokens": "SELECT '', SUM(num_tokens) FROM groups WHERE num_tokens > 0",
}


def prepare(db: sqlite3.Connection, path: Path | str, segments: Segments) -> None:
    """Create the tables in a new database, or bring those of version 0 to the present form.

    Args:
        db: the database.
        path: its file, for messages.
        segments: takes the rollouts of a ledger of version 0, which had them in the database.

    Raises:
        LedgerError: the database is not a ledger of a version that can be read.
    """
    _add_functions(db)
    db.execute(f"PRAGMA page_size={_PAGE_BYTES}")
    db.execute("PRAGMA journal_mode=WAL")
    with db:  # all of it, or nothing
        db.execute("BEGIN IMMEDIATE")
        check_version(db, path)
        version = tables_version(db)
        if version is None:
            create_tables(db)
            _run(db, VERSIONS)
        elif version == 0:
            migrate(db, segments, create_tables)
        if version != VERSION:
            _digest_rows(db)
        db.execute(f"PRAGMA user_version={VERSION}")


def create_tables(db: sqlite3.Connection) -> None:
    """Create all tables but that of the versions, inside a transaction."""
    _run(db, _TABLES + _TALLY)


def _add_functions(db: sqlite3.Connection) -> None:
    db.create_function("row_digest", -1, _row_digest, deterministic=True)


def _row_digest(*values: object) -> int:
    return crc32(repr(values).encode())


def _digest_rows(db: sqlite3.Connection) -> None:
    """Give a digest to every row, and let the database renew it with each change."""
    for table, columns in _DIGESTED.items():
        key = columns.partition(",")[0]
        new = ", ".join(f"NEW.{column}" for column in columns.split(", "))
        for name, change in (("added", "INSERT"), ("changed", f"UPDATE OF {columns}")):
            db.execute(
                f"CREATE TRIGGER digest_{table}_{name} AFTER {change} ON {table} BEGIN "
                f"UPDATE {table} SET digest = row_digest({new}) WHERE {key} = NEW.{key}; END"
            )
        db.execute(f"UPDATE {table} SET digest = row_digest({columns})")


def damage_of(path: Path) -> str | None:
    """Return what is damaged in the file of a ledger, or None. This reads all of it: some seconds for a million groups.

    A process that writes to the ledger meanwhile is not noticed: the whole check sees one moment.

    Args:
        path: the file.

    Raises:
        LedgerError: it is a ledger of another version.
        LedgerUnreadable: it cannot be read, for example because another program has locked it.
    """
    try:
        with read_only(path) as db:
            _add_functions(db)
            db.execute("BEGIN")
            version = tables_version(db)
            if version is None:
                return "it is empty"
            (found,) = db.execute("PRAGMA integrity_check(1)").fetchone()
            if found != "ok":
                return str(found)
            check_version(db, path)
            return _damaged_rows(db) if version == VERSION else None
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
        return str(error)


@contextmanager
def read_only(path: Path, timeout_s: float | None = None) -> Iterator[sqlite3.Connection]:
    """Open the file of a ledger for reading alone. A process that writes it is neither stopped nor made to wait.

    Args:
        path: the file.
        timeout_s: seconds for which another program may lock it; None: LOCK_DEADLINE_S.

    Yields:
        The database, without a transaction; BEGIN gives all further queries one snapshot.

    Raises:
        LedgerLocked: another program has locked it for so long.
        LedgerUnreadable: it cannot be read for another reason than its content.
        sqlite3.DatabaseError: what is in it is damaged.
    """
    wait_s = LOCK_DEADLINE_S if timeout_s is None else timeout_s
    uri = f"{path.absolute().as_uri()}?mode=ro"
    try:
        with closing(sqlite3.connect(uri, wait_s, isolation_level=None, uri=True)) as db:
            yield db
    except sqlite3.DatabaseError as error:
        code = error.sqlite_errorcode & 0xFF
        if code in _LOCKED:
            raise LedgerLocked(
                f"{path} has been locked by another program for {wait_s:g} s; end that program"
            ) from error
        if code in _UNREADABLE:
            raise LedgerUnreadable(
                f"{path} cannot be read ({error}), and may be intact; make it readable, and the folder writable"
            ) from error
        raise


def _damaged_rows(db: sqlite3.Connection) -> str | None:
    for table, columns in _DIGESTED.items():
        where = f"digest IS NOT row_digest({columns})"
        key, count = db.execute(f"SELECT {columns.partition(',')[0]}, COUNT(*) FROM {table} WHERE {where}").fetchone()
        if count:
            return f"{count} rows of its table {table} do not have the values that were written, the first at {key}"
    for kind, query in _TALLIES.items():
        kept = db.execute("SELECT name, total FROM tally WHERE kind = ? AND total <> 0", (kind,))
        if dict(kept) != {name: total for name, total in db.execute(query) if total}:
            return f"its totals by {kind} are not those of its groups"
    return None


def check_version(db: sqlite3.Connection, path: Path | str) -> None:
    """Raise LedgerError if the database has tables, and they are not those of a version that can be read."""
    version = tables_version(db)
    if version not in (None, 0, VERSION) or (version == 0 and not _has_table(db, "payloads")):
        raise LedgerError(
            f"{path} is a ledger of version {version}, and this quatro_ray reads version {VERSION}; continue the run "
            "with the quatro_ray that began it, or begin a new one in another run.dir"
        )


def tables_version(db: sqlite3.Connection) -> int | None:
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
