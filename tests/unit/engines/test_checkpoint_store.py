"""Checkpoints on a real file system: whole or not there, damage by name, retention, room."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from quatro_ray.engines.checkpoint_store import CheckpointStore, digest_files, replace_folder
from quatro_ray.errors import CheckpointError


def write(store: CheckpointStore, step: int, content: str = "weights") -> Path:
    folder = store.begin(step)
    (folder / "rank_0.pt").write_text(content)
    (folder / "rank_1.pt").write_text(content * 2)
    digests = {**digest_files(folder, 0, 2), **digest_files(folder, 1, 2)}
    return store.commit(folder, version=10 * step, state={"tally": step}, digests=digests).path


def newest(store: CheckpointStore) -> tuple[int | None, list[str]]:
    told: list[str] = []
    found = store.newest(told.append)
    return (found.step if found else None), told


def test_the_newest_ones_are_kept_and_say_what_they_are(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "c", keep=2)
    assert store.newest(print) is None and store.oldest_version() is None and store.newest_step() is None
    for step in (5, 10, 100):
        write(store, step)
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["step_10", "step_100"]
    found = CheckpointStore(tmp_path / "c", keep=2).newest(print)
    assert found is not None
    assert (found.step, found.version, found.state, found.path.name) == (100, 1000, {"tally": 100}, "step_100")
    assert (store.oldest_version(), store.newest_step()) == (100, 100)


def test_pinned_ones_are_kept_besides(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "c", keep=1, pinned={4, 9})
    for step in (4, 5, 9, 10):
        write(store, step)
    assert store.steps() == [10, 9, 4]
    assert store.oldest_version() == 100  # rollouts since a pinned one are not kept


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (lambda p: (p / "rank_1.pt").write_text("weightsweight"), "rank_1.pt has 13 bytes instead of 14"),
        (lambda p: (p / "rank_0.pt").write_text("weighst"), "rank_0.pt does not have the checksum"),
        (lambda p: (p / "rank_0.pt").unlink(), "rank_0.pt is missing"),
        (lambda p: (p / "state.json").write_text("{}"), "state.json has 2 bytes"),
        (lambda p: (p / "manifest.json").write_text("{"), "manifest.json is not a manifest"),
        (lambda p: (p / "manifest.json").write_text('{"files": ["a"]}'), "manifest.json is not a manifest"),
        (lambda p: (p / "manifest.json").write_text('{"files": {"a": 1}}'), "manifest.json is not a manifest"),
        (lambda p: (p / "manifest.json").write_text('{"files": {"a": [null, null]}}'), "manifest.json is not a manif"),
    ],
)
def test_a_damaged_one_is_named_put_aside_and_the_one_before_is_used(tmp_path: Path, damage, what: str) -> None:  # type: ignore[no-untyped-def]
    store = CheckpointStore(tmp_path, keep=3)
    write(store, 1), write(store, 2)
    damage(tmp_path / "step_2")
    step, (told,) = newest(store)
    assert step == 1 and f"step_2: {what}" in told
    assert (tmp_path / "step_2.damaged").is_dir() and not (tmp_path / "step_2").exists()
    assert newest(store) == (1, [])
    write(store, 2)  # the same step again, by a line that goes on
    assert newest(store) == (2, [])


def test_a_folder_that_is_no_longer_there_does_not_mean_step_0(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "c", keep=3)
    assert newest(store) == (None, [])
    write(store, 1)
    for held in (store, CheckpointStore(tmp_path / "c", keep=3)):
        assert newest(held) == (1, [])
        (tmp_path / "c").rename(tmp_path / "away")  # as a mount that is lost
        with pytest.raises(CheckpointError, match=r"has no checkpoint any more, and step_1 was there; mount or"):
            newest(held)
        (tmp_path / "away").rename(tmp_path / "c")


def test_other_folders_are_no_checkpoints(tmp_path: Path) -> None:
    for name in ("step_²", "step_", "step_x", "step_-1"):
        (tmp_path / name).mkdir()
    assert CheckpointStore(tmp_path, keep=1).steps() == []


def test_what_was_not_completed_is_never_seen(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    write(store, 1)
    (store.begin(2) / "rank_0.pt").write_text("half")
    assert newest(store) == (1, [])
    store.begin(3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_1", "step_3.writing"]


def test_a_file_that_a_rank_did_not_write_whole_is_refused_and_the_old_one_stays(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    write(store, 1)
    folder = store.begin(2)
    (folder / "rank_0.pt").write_text("weights")
    digests = digest_files(folder)
    (folder / "rank_0.pt").write_text("weigh")
    with pytest.raises(CheckpointError, match=r"rank_0.pt has 5 bytes instead of 7"):
        store.commit(folder, 20, {}, digests)
    assert newest(store) == (1, [])


def test_a_disk_without_room_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    store.check_space()
    write(store, 1, "x" * 1000)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2000))
    with pytest.raises(CheckpointError, match=r"2,000 bytes are free and a checkpoint takes 3,\d+: free some space"):
        store.check_space()
    again = CheckpointStore(tmp_path, keep=1)
    again.newest(print)
    with pytest.raises(CheckpointError):
        again.check_space()


def test_folders_are_replaced_whole(tmp_path: Path) -> None:
    (tmp_path / "export").mkdir()
    (tmp_path / "export.writing").mkdir()
    (tmp_path / "export.writing" / "new").touch()
    replace_folder(tmp_path / "export.writing", tmp_path / "export")
    assert [p.name for p in (tmp_path / "export").iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["export"]


def test_one_that_cannot_be_read_is_told_and_left_alone(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    path = write(store, 1)
    (path / "manifest.json").rename(path / "elsewhere")
    (path / "manifest.json").mkdir()  # any error that is not about the content, such as a missing permission
    with pytest.raises(CheckpointError, match=r"step_1: cannot be read \(.*\), and may be intact; make it readable"):
        newest(store)
    (path / "manifest.json").rmdir()
    (path / "elsewhere").rename(path / "manifest.json")
    assert newest(store) == (1, [])
