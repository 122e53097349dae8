"""A ledger is read as it is at one moment, beside the process that writes it."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from quatro_ray.errors import LedgerLocked, LedgerUnreadable
from quatro_ray.replay import schema
from quatro_ray.replay.buffer import ReplayBuffer
from quatro_ray.replay.ledger_reader import (
    GroupRow,
    LedgerRows,
    VersionRow,
    check_host,
    read_rows,
    read_totals,
    tell_host,
)
from quatro_ray.types import DropReason, Query
from tests.unit.replay.buffers import make_buffer, to_ready


def fill(path: Path) -> ReplayBuffer:
    """Two steps, of which one is abandoned; a group in every state."""
    buffer = make_buffer(path)
    for version in range(2):
        to_ready(buffer, 2, version)
        buffer.lease(version)
        buffer.commit(version)
    buffer.fall_back(1, 2)
    to_ready(buffer, 2, 3)
    buffer.lease(3)
    buffer.ledger.admit(buffer.ledger.next_id(), [Query(str(n), "1+1=", "2") for n in range(2)], 3)
    buffer.drop(buffer.ledger.next_id() - 1, DropReason.VERIFIER_ERROR)
    return buffer


def test_rows_and_totals_are_those_of_the_buffer_that_writes_them(tmp_path: Path) -> None:
    path = tmp_path / "a ledger # 100%?.sqlite"  # characters that mean something in a URI
    buffer = fill(path)
    rows = read_rows(path)
    assert rows.groups[0] == GroupRow(1, "trained", None, 0, 0, 0, 6)
    assert [g.state for g in rows.groups] == ["trained", "trained", "leased", "leased", "ready", "ready", "pending",
                                              "dropped"]  # fmt: skip
    assert rows.versions[3] == VersionRow(3, 1, 1, True)
    assert [v.version for v in rows.lineage] == [0, 1, 3] and rows.step == 1
    assert rows.committed == {0: 1} and rows.trained == {1: 0, 2: 0}
    assert (rows.without_query, rows.without_rollouts) == ((), ())
    totals = read_totals(path, 1.0)
    assert totals is not None and (totals.version, totals.step) == (3, 1)
    assert totals.groups == {state: n for state, n in buffer.stats().groups.items() if n}
    assert totals.drops == {"verifier_error": 1}
    buffer.ledger.close()


def test_groups_that_cannot_go_on_are_told(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    fill(path).ledger.close()
    with closing(sqlite3.connect(path)) as db:
        db.executescript(
            "DELETE FROM queries WHERE group_id IN (1, 7); DELETE FROM rollouts WHERE group_id IN (1, 3, 6)"
        )
    rows = read_rows(path)
    assert (rows.without_query, rows.without_rollouts) == ((7,), (3, 6))


def test_one_that_is_not_there_or_has_no_tables_yet_has_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    for _ in range(2):
        assert read_rows(path) == LedgerRows() and read_totals(path, 1.0) is None
        assert read_rows(path).step == 0
        path.touch()


def test_a_transaction_of_the_writer_is_seen_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    buffer = fill(path)
    before = read_rows(path)
    with buffer.ledger.transaction():
        buffer.commit(3)
        assert read_rows(path) == before
    assert read_rows(path).trained == before.trained | {3: 3, 4: 3}
    buffer.ledger.close()


def test_a_lock_that_stays_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ledger.sqlite"
    fill(path).ledger.close()
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("PRAGMA locking_mode=EXCLUSIVE")
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(LedgerLocked, match=r"locked by another program for 0\.1 s"):
            read_totals(path, 0.1)
        monkeypatch.setattr(schema, "LOCK_DEADLINE_S", 0.2)
        with pytest.raises(LedgerLocked, match=r"locked by another program for 0\.2 s"):
            read_rows(path)


def test_a_ledger_in_use_is_read_on_its_own_machine_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ledger.sqlite"
    check_host(path)  # of an earlier quatro_ray, or a test
    tell_host(path)
    check_host(path)
    with monkeypatch.context() as patch:
        patch.setattr("socket.gethostname", lambda: "elsewhere")
        with pytest.raises(
            LedgerUnreadable, match=r"is in use on .*, and can be read only there until the run has ended"
        ):
            check_host(path)
        tell_host(path)  # the buffer was restarted there
        check_host(path)
    with pytest.raises(LedgerUnreadable, match="is in use on elsewhere"):
        check_host(path)
