"""A run directory is never replaced or continued by mistake."""

from __future__ import annotations

import errno
import json
import os
import socket
import sqlite3
import stat
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest

from quatro_ray.config import load_config
from quatro_ray.errors import ConfigError
from quatro_ray.jobs import run_directory
from quatro_ray.jobs.run_directory import check_run_dir, claim_run_dir, only_writer, prepare_run_dir
from quatro_ray.replay.ledger import Ledger
from tests.make import config, group


def run(path: Path, **over: Any) -> Any:
    sections = {"run": {"dir": str(path), "num_steps": 30, "resume": "auto"} | over.pop("run", {})} | over
    return config(path, **sections)


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """A run with a ledger and two checkpoints."""
    path = tmp_path / "run"
    assert not prepare_run_dir(run(path))
    ledger_of(path, num_groups=1)
    for step in (10, 20):
        (path / "checkpoints" / f"step_{step}").mkdir(parents=True)
    return path


def test_a_run_directory_is_for_its_owner_only(begun: Path, tmp_path: Path) -> None:
    assert stat.S_IMODE(begun.stat().st_mode) == 0o700
    shared = tmp_path / "shared"
    shared.mkdir(mode=0o750)
    prepare_run_dir(run(shared))
    assert stat.S_IMODE(shared.stat().st_mode) == 0o750  # as its owner has made it


def test_a_run_goes_on_also_to_another_end(begun: Path) -> None:
    assert prepare_run_dir(run(begun))
    assert prepare_run_dir(run(begun, run={"num_steps": 20}))
    assert prepare_run_dir(run(begun, run={"num_steps": 50}, learner={"num_ranks": 1}))
    assert load_config(begun / "config.yaml").run.num_steps == 50


def test_a_run_keeps_its_ids_in_trackers_until_it_is_replaced(begun: Path) -> None:
    (begun / "trackers.json").write_text("{}")
    prepare_run_dir(run(begun))
    assert (begun / "trackers.json").exists()
    prepare_run_dir(run(begun, run={"resume": "never", "overwrite": True}))
    assert not (begun / "trackers.json").exists()


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"run": {"num_steps": 19}}, "run.num_steps=19: .* has a checkpoint of step 20; set at least that"),
        ({"run": {"seed": 1}}, "run.seed: differs from that of the run in"),
        ({"replay": {"group_size": 8}}, "replay.group_size: differs"),
        ({"learner": {"learning_rate": 2e-3}}, "learner.learning_rate: differs"),
        ({"learner": {"lora": {"rank": 8}}}, "learner.lora.alpha: differs from that"),
        ({"run": {"resume": "never"}}, "is not empty; choose another, or set run.overwrite=true"),
    ],
)
def test_another_run_does_not_go_on_in_its_place(begun: Path, over: dict[str, Any], message: str) -> None:
    before = (begun / "config.yaml").read_text()
    with pytest.raises(ConfigError, match=message):
        prepare_run_dir(run(begun, **over))
    assert (begun / "config.yaml").read_text() == before
    assert (begun / "ledger.sqlite").is_file()


def test_one_that_is_under_way_is_left_alone(begun: Path) -> None:
    before = (begun / "config.yaml").read_text()
    for over in ({"num_steps": 50}, {"resume": "never", "overwrite": True}):
        with only_writer(run(begun)), pytest.raises(ConfigError, match="another run writes here; end it first"):
            prepare_run_dir(run(begun, run=over))
    assert (begun / "config.yaml").read_text() == before


def test_a_run_whose_checkpoints_are_gone_does_not_begin_again(begun: Path) -> None:
    """Their folder may not be mounted; step 0 would discard all steps."""
    lines = [
        {"event": "written", "part": "checkpoint", "step": 10},
        {"event": "written", "part": "checkpoint", "step": 20},
        {"event": "lost", "part": "learner"},
    ]
    (begun / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert prepare_run_dir(run(begun))
    for folder in (begun / "checkpoints").iterdir():
        folder.rmdir()
    for check in (prepare_run_dir, check_run_dir):
        with pytest.raises(ConfigError, match=r"checkpoints: has no checkpoint, but .* written that of step 20; mount"):
            check(run(begun))
    (begun / "checkpoints/step_20.damaged").mkdir()
    assert prepare_run_dir(run(begun))  # the start says that it is damaged
    assert not prepare_run_dir(run(begun, run={"resume": "never", "overwrite": True}))


@pytest.mark.parametrize("name", ["a#b", "a?b", "a%41"])
def test_odd_names_of_the_directory(name: str, tmp_path: Path) -> None:
    assert not prepare_run_dir(run(tmp_path / name))
    ledger_of(tmp_path / name, num_groups=1)
    (tmp_path / name / "metrics.jsonl").write_text("{}\n")
    assert prepare_run_dir(run(tmp_path / name))
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_an_attempt_in_another_pod_is_left_time_to_end(begun: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pod that a new one replaces still writes its checkpoint; a RayJob that is refused would not run again."""
    monkeypatch.setattr(run_directory, "_LOOK_EVERY_S", 0.01)
    said: list[str] = []
    tell_that_older_runs(begun, "pod-1")
    older = only_writer(run(begun))
    older.__enter__()

    def say(what: str) -> None:
        said.append(what)
        older.__exit__(None, None, None)  # its process ends meanwhile

    with claim_run_dir(run(begun), say=say) as claim:
        assert claim.resumes
    assert "an earlier attempt on pod-1 still writes here; it has 85 s to write its checkpoint and end" in said[0]


@pytest.mark.parametrize(
    ("host", "over"),
    [
        ("pod-1", {"checkpoint": {"grace_s": 0.1}}),  # it never ends
        ("pod-1", {"run": {"resume": "never", "overwrite": True}}),
        (socket.gethostname(), {}),  # a second run on one machine is a mistake, not a successor
    ],
)
def test_an_attempt_that_is_not_ending_is_not_waited_for(
    begun: Path, host: str, over: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_directory, "_LOOK_EVERY_S", 0.01)
    monkeypatch.setattr(run_directory, "_AFTER_CHECKPOINT_S", 0.0)
    said: list[str] = []
    tell_that_older_runs(begun, host)
    with only_writer(run(begun)), pytest.raises(ConfigError, match="another run writes here; end it first"):
        claim_run_dir(run(begun, **over), say=said.append).__enter__()
    assert len(said) == ("checkpoint" in over)


def tell_that_older_runs(path: Path, host: str) -> None:
    file = path / "writer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"host": host, "has_ended": False}))


def test_only_an_earlier_run_is_replaced(begun: Path, tmp_path: Path) -> None:
    assert not prepare_run_dir(run(begun, run={"resume": "never", "overwrite": True}))
    assert not (begun / "ledger.sqlite").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    for over in ({}, {"resume": "never", "overwrite": True}):
        with pytest.raises(ConfigError, match=r"is not empty|it is not a run, and run.overwrite does not replace it"):
            prepare_run_dir(run(tmp_path / "mine", run=over))
    assert (tmp_path / "mine" / "thesis.tex").is_file()


def test_a_replaced_run_leaves_its_directory_where_it_is(begun: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(begun)
    assert not prepare_run_dir(run(tmp_path / "link", run={"resume": "never", "overwrite": True}))
    assert (tmp_path / "link").is_symlink()
    assert sorted(p.name for p in begun.iterdir()) == [".writer", "config.yaml", "writer.json"]


def test_checkpoints_of_two_runs_never_meet(tmp_path: Path) -> None:
    kept = {"checkpoint": {"dir": str(tmp_path / "kept")}}
    assert not prepare_run_dir(run(tmp_path / "a", **kept))
    ledger_of(tmp_path / "a", num_groups=1)
    (tmp_path / "kept" / "step_10").mkdir()
    assert prepare_run_dir(run(tmp_path / "a", **kept))
    for path, over in ((tmp_path / "a", {"resume": "never", "overwrite": True}), (tmp_path / "b", {})):
        with pytest.raises(ConfigError, match=r"kept: has a checkpoint of another run \(step_10\); choose another"):
            prepare_run_dir(run(path, run=over, **kept))
    assert (tmp_path / "a" / "ledger.sqlite").is_file()
    with pytest.raises(ConfigError, match=r"checkpoint\.dir: differs from that of the run"):
        prepare_run_dir(run(tmp_path / "a"))
    (tmp_path / "kept" / "step_10").rmdir()
    with only_writer(run(tmp_path / "a", **kept)), pytest.raises(ConfigError, match="kept: another run writes here"):
        only_writer(run(tmp_path / "b", **kept)).__enter__()


def test_checkpoints_within_the_run_are_the_runs(tmp_path: Path) -> None:
    path = tmp_path / "run"
    within: dict[str, Any] = {"checkpoint": {"dir": str(path / "kept")}}
    assert not prepare_run_dir(run(path, **within))
    ledger_of(path, num_groups=1)
    (path / "kept" / "step_10").mkdir(parents=True)
    assert prepare_run_dir(run(path, **within))
    assert not prepare_run_dir(run(path, run={"resume": "never", "overwrite": True}, **within))
    assert sorted(p.name for p in path.iterdir()) == [".writer", "config.yaml", "writer.json"]


def test_what_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, over in (
        (tmp_path / "file" / "run", {}),
        (tmp_path / "c", {"checkpoint": {"dir": str(tmp_path / "file" / "kept")}}),
    ):
        with pytest.raises(ConfigError, match=r"cannot be used \(.*Not a directory.*\); choose others"):
            prepare_run_dir(run(path, **over))
    assert not (tmp_path / "c").exists()


def ledger_of(path: Path, *, num_groups: int) -> None:
    with closing(Ledger(path / "ledger.sqlite")) as ledger:
        ledger.admit(0, [group(i).query for i in range(num_groups)], 0)


@pytest.mark.parametrize("resume", ["never", "auto"])
@pytest.mark.parametrize("got_to", ["nothing", "recording", "an empty ledger"])
def test_a_start_that_failed_is_in_no_ones_way(tmp_path: Path, resume: str, got_to: str) -> None:
    path = tmp_path / "run"
    assert not prepare_run_dir(run(path, learner={"learning_rate": 2e-3}))
    if got_to != "nothing":
        for name in ("metrics.jsonl", "notes.log", "timeline.jsonl", "now.json", "ledger.host"):
            (path / name).touch()
    if got_to == "an empty ledger":
        ledger_of(path, num_groups=0)
    corrected = run(path, run={"resume": resume})
    check_run_dir(corrected)
    assert not prepare_run_dir(corrected)
    assert load_config(path / "config.yaml") == corrected


@pytest.mark.parametrize("left", ["thesis.tex", "checkpoints/step_1", "metrics.jsonl", "one group"])
def test_what_was_trained_or_is_not_ours_is_in_the_way(tmp_path: Path, left: str) -> None:
    path = tmp_path / "run"
    assert not prepare_run_dir(run(path))
    if left == "one group":
        ledger_of(path, num_groups=1)
    else:
        (path / left).parent.mkdir(exist_ok=True)
        (path / left).write_text("x")
    for use in (check_run_dir, prepare_run_dir):
        with pytest.raises(ConfigError, match="is not empty"):
            use(run(path, run={"resume": "never"}))


def test_of_two_first_starts_one_has_the_directory_and_its_own_configuration(tmp_path: Path) -> None:
    for number in range(40):
        path, barrier, held = tmp_path / f"run-{number}", Barrier(2), Barrier(2)

        def start(num_steps: int, path: Path = path, barrier: Barrier = barrier, held: Barrier = held) -> int | None:
            mine = run(path, run={"num_steps": num_steps})
            barrier.wait(60)
            try:
                with claim_run_dir(mine):
                    held.wait(60)  # the other one has been refused
                    assert load_config(path / "config.yaml") == mine
                    return num_steps
            except ConfigError as error:
                held.wait(60)
                assert "another run writes here" in str(error) or "is not empty" in str(error)
                return None

        with ThreadPoolExecutor(2) as threads:
            results = list(threads.map(start, (3, 4)))
        assert sorted(results, key=str) in ([3, None], [4, None])


def test_a_full_disk_leaves_the_old_configuration(begun: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (begun / "config.yaml").read_text()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match=r"cannot be used \(.*No space left on device"):
        prepare_run_dir(run(begun, run={"num_steps": 50}))
    assert (begun / "config.yaml").read_text() == before
    assert not list(begun.glob("*.writing"))
    monkeypatch.undo()
    assert prepare_run_dir(run(begun, run={"num_steps": 50}))


@pytest.mark.parametrize("content", [b"not a database, but long enough to be looked at" * 99, None])
def test_a_ledger_that_cannot_be_continued_is_refused_before_anything_starts(
    begun: Path, content: bytes | None
) -> None:
    ledger_of(begun, num_groups=1)
    if content is None:
        with closing(sqlite3.connect(begun / "ledger.sqlite")) as db:
            db.execute("PRAGMA user_version=7")
            db.commit()
    else:
        (begun / "ledger.sqlite").write_bytes(content)
    for use in (check_run_dir, prepare_run_dir):
        with pytest.raises(ConfigError, match=r"the run in it cannot be continued: .*(version 7|not a database)"):
            use(run(begun))
