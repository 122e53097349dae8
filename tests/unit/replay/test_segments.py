"""Rollouts in files: on a full disk, damaged, no longer needed, and flushed."""

from __future__ import annotations

import errno
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from quatro_ray.errors import DiskFull, LedgerError
from quatro_ray.types import GroupState, Query
from tests.make import group, rollout
from tests.unit.replay.buffers import make_buffer, to_ready

S = GroupState


def segments(folder: Path) -> list[Path]:
    return sorted((folder / "ledger.rollouts").iterdir())


def damage(segment: Path) -> None:
    content = bytearray(segment.read_bytes())
    for at in range(0, len(content), 100):
        content[at] ^= 1
    segment.write_bytes(content)


@pytest.mark.parametrize("what", [damage, Path.unlink, lambda segment: os.truncate(segment, 10)])
def test_groups_whose_rollouts_cannot_be_read_are_generated_again(
    tmp_path: Path, what: Callable[[Path], object]
) -> None:
    buffer = make_buffer(tmp_path / "ledger.sqlite")
    trained = to_ready(buffer, 2)
    buffer.lease(0)
    buffer.commit(0)
    buffer.ledger.close()
    again = make_buffer(tmp_path / "ledger.sqlite")
    whole = to_ready(again, 1, 1)  # in a segment of its own
    old, new = segments(tmp_path)
    what(old)
    assert again.recover().num_damaged == 2
    assert again.recover().num_damaged == 0
    assert again.ledger.counts()[S.TRAINED] == 2 and again.ledger.has_payload(whole[0])
    back = again.fall_back(0, known=1)
    assert (back.num_ready, back.num_pending) == (0, 3)
    assert [i for i, _ in again.pending()] == trained + whole

    (ready, *_) = [e.group_id for e in again.ledger.entries(S.PENDING)]
    again.ready(group(ready, rollout(version=2), rollout(version=2)))
    what(new)
    assert again.recover().num_damaged == 2, "those of before the fall-back count too"
    assert again.ledger.counts()[S.READY] == 0 and again.ledger.counts()[S.PENDING] == 3


def test_a_lease_of_damaged_rollouts_names_the_file_and_the_remedy(tmp_path: Path) -> None:
    buffer = make_buffer(tmp_path / "ledger.sqlite")
    to_ready(buffer, 2)
    (segment,) = segments(tmp_path)
    damage(segment)
    with pytest.raises(LedgerError, match=r"rollouts of group \d cannot be read: .*1-1 is damaged .*resume=auto"):
        buffer.lease(0)
    assert buffer.ledger.counts()[S.READY] == 2


def test_segments_are_deleted_when_nothing_in_them_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quatro_ray.replay.segments._MAX_BYTES", 1)  # one group a segment
    buffer = make_buffer(tmp_path / "ledger.sqlite")
    ids = to_ready(buffer, 4)
    assert len(segments(tmp_path)) == 4
    buffer.lease(0)
    buffer.commit(0)
    buffer.absorbed(1)
    assert [path.name for path in segments(tmp_path)] == ["1-3", "1-4"]
    assert [bool(buffer.ledger.payload(i)) for i in ids[2:]] == [True, True]


def test_rollouts_on_a_full_disk_are_told_and_may_be_stored_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a part of them was written."""
    buffer = make_buffer(tmp_path / "ledger.sqlite")
    to_ready(buffer, 1)
    (i,) = buffer.admit(2, [Query("q", "p", "a")], 0)
    write = os.pwrite

    def half(file: int, data: bytes, start: int) -> int:
        monkeypatch.setattr(os, "pwrite", full)
        return write(file, data[: len(data) // 2], start)

    def full(*_args: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", half)
    with pytest.raises(DiskFull, match="rollouts cannot be written"):
        buffer.ready(group(i))
    assert buffer.ledger.counts()[S.PENDING] == 1
    monkeypatch.setattr(os, "pwrite", write)
    buffer.ready(group(i))
    _, lease = buffer.lease(0)
    assert lease is not None and len(lease.groups) == 2


def test_flush_does_not_depend_on_readers(tmp_path: Path) -> None:
    """A reader keeps SQLite from moving its log into the database, but not from writing the log to the disk."""
    buffer = make_buffer(tmp_path / "ledger.sqlite")
    reader = sqlite3.connect(tmp_path / "ledger.sqlite", isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT * FROM groups").fetchall()
    to_ready(buffer, 2)
    traced: list[str] = []
    buffer.ledger._db.set_trace_callback(traced.append)
    buffer.ledger.flush()
    assert traced.index("PRAGMA synchronous=FULL") < traced.index("COMMIT") < traced.index("PRAGMA synchronous=NORMAL")
    reader.close()
