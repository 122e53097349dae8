"""Files of ledgers with flipped bits, cut, or locked: nothing that differs from what was written goes unnoticed."""

from __future__ import annotations

import random
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from quatro_ray.errors import LedgerError, LedgerLocked, LedgerUnreadable
from quatro_ray.replay import schema
from quatro_ray.replay.ledger import Ledger
from quatro_ray.replay.schema import damage_of
from quatro_ray.types import DropReason, Query
from tests.unit.replay.buffers import make_buffer, to_ready

_NUM_FLIPS = 300


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A ledger with groups in every state, closed."""
    path = tmp_path / "ledger.sqlite"
    buffer = make_buffer(path)
    for version in range(4):
        to_ready(buffer, 2, version)
        buffer.lease(version)
        buffer.commit(version)
    to_ready(buffer, 3, 4)
    buffer.lease(4)
    buffer.ledger.admit(buffer.ledger.next_id(), [Query(str(n), "1+1=", "2") for n in range(3)], 4)
    buffer.drop(buffer.ledger.next_id() - 1, DropReason.VERIFIER_ERROR)
    buffer.ledger.close()
    return path


def content(path: Path) -> list[Any]:
    with closing(sqlite3.connect(f"file:{path}?mode=ro&immutable=1", uri=True)) as db:
        return [db.execute(f"SELECT * FROM {table} ORDER BY 1, 2").fetchall() for table in [*schema._DIGESTED, "tally"]]


def test_a_ledger_that_is_whole_has_no_damage(path: Path) -> None:
    assert damage_of(path) is None
    ledger = Ledger(path)  # in use, with changes that are in its log only
    ledger.admit(ledger.next_id(), [Query("new", "1+1=", "2")], 4)
    assert damage_of(path) is None
    ledger.close()


def test_a_change_during_the_check_is_no_damage(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger, read_only = Ledger(path), schema.read_only
    added: list[int] = []

    def add(statement: str) -> None:
        if statement == schema._TALLIES["state"] and not added:  # the totals have just been read
            added.append(ledger.next_id())
            ledger.admit(added[0], [Query("new", "1+1=", "2")], 4)

    @contextmanager
    def watched(path: Path) -> Iterator[sqlite3.Connection]:
        with read_only(path) as db:
            db.set_trace_callback(add)
            yield db

    monkeypatch.setattr(schema, "read_only", watched)
    assert damage_of(path) is None
    assert added
    ledger.close()


def test_flipped_bits_that_change_anything_are_noticed(path: Path) -> None:
    whole, before, chance = path.read_bytes(), content(path), random.Random(0)
    num_noticed = 0
    for _ in range(_NUM_FLIPS):
        flipped = bytearray(whole)
        flipped[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        path.write_bytes(flipped)
        try:
            if damage_of(path) is None:  # a byte that nothing uses
                assert content(path) == before
                continue
        except LedgerError as error:  # in the number of the version
            assert "is a ledger of version" in str(error)
        num_noticed += 1
    assert num_noticed > _NUM_FLIPS / 3


def test_a_row_that_another_program_has_changed_is_noticed(path: Path) -> None:
    with closing(sqlite3.connect(path)) as db:
        db.create_function("row_digest", -1, lambda *_: 7)
        db.execute("UPDATE groups SET mean_reward = 1 WHERE group_id = 2")
        db.commit()
    assert damage_of(path) == "1 rows of its table groups do not have the values that were written, the first at 2"


@pytest.mark.parametrize("size", [0, 100, 1000, 5000])
def test_a_cut_file_is_noticed(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])
    assert damage_of(path) is not None


def test_a_file_that_cannot_be_read_is_not_called_damaged(tmp_path: Path) -> None:
    with pytest.raises(LedgerUnreadable, match=r"cannot be read \(.*\), and may be intact"):
        damage_of(tmp_path)  # a folder cannot be opened either


def test_a_copy_is_whole_and_the_same(path: Path, tmp_path: Path) -> None:
    ledger = Ledger(path)
    ledger.admit(ledger.next_id(), [Query("new", "1+1=", "2")], 4)
    ledger.snapshot(tmp_path / "copy")
    ledger.close()
    assert damage_of(tmp_path / "copy") is None
    assert content(tmp_path / "copy") == content(path)


def test_a_lock_of_another_program_is_waited_for(path: Path) -> None:
    ledger = Ledger(path)
    other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    begun = time.monotonic()
    threading.Timer(1.0, lambda: other.execute("COMMIT")).start()
    assert ledger.admit(ledger.next_id(), [Query("new", "1+1=", "2")], 4)
    assert time.monotonic() - begun > 0.5
    other.close()
    ledger.close()


def test_a_lock_that_stays_is_named(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schema, "LOCK_DEADLINE_S", 0.2)
    ledger = Ledger(path)
    before = ledger.counts()
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(LedgerLocked, match=r"locked by another program for 0\.2 s; end that program"):
        ledger.admit(ledger.next_id(), [Query("new", "1+1=", "2")], 4)
    other.execute("COMMIT")
    assert ledger.counts() == before
    assert ledger.admit(ledger.next_id(), [Query("new", "1+1=", "2")], 4)
    ledger.close()
    other.execute("PRAGMA locking_mode=EXCLUSIVE")
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(LedgerError, match="locked by another program"):
        damage_of(path)
    other.close()
