"""The state of a run: in progress, killed, hanging, ended and finished, from its files alone."""

from __future__ import annotations

import io
import json
import math
import os
import sqlite3
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from quatro_ray.config import dump_config
from quatro_ray.errors import ConfigError, LedgerUnreadable
from quatro_ray.jobs import status_view
from quatro_ray.jobs.audit import audit_run
from quatro_ray.jobs.run_directory import is_in_use, only_writer
from quatro_ray.jobs.status import Member, read_status
from quatro_ray.jobs.status_view import show_status, view
from quatro_ray.replay.ledger import Ledger
from quatro_ray.replay.ledger_reader import tell_host
from quatro_ray.telemetry.activity import Activity
from quatro_ray.telemetry.now_file import NowFile, read_now
from tests.make import config
from tests.unit.jobs.writing import steps_made, writing
from tests.unit.telemetry.run_maker import write_run


def line_of(text: str, label: str) -> str:
    """Return the line with this label, without it."""
    return next(line[len(label) :].strip() for line in text.splitlines() if line.startswith(label))


@pytest.mark.process
def test_a_run_in_progress_and_what_is_left_of_it_when_it_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with writing(path) as process:
        while (made := steps_made(process)) < 5 or "learner" not in [m.name for m in read_status(path).doing]:
            pass
        status = read_status(path)
        assert status.state == "running" and status.step >= made and status.num_steps == 10_000
        assert status.version is not None and status.version >= status.step
        assert status.end_at is not None and status.at < status.end_at
        assert status.groups["trained"] == 2 * status.version
        assert status.faults == {"generator lost": 1}
        assert [e["why"] for e in status.recent_faults] == ["its process was killed"]
        doing = {member.name: member for member in status.doing}
        assert doing["generator 0"].state == "busy" and doing["learner"].state in ("train", "idle")
        assert (doing["generator 0"].num_running, doing["generator 0"].kv_cache_usage) == (3, 0.25)
        assert 0 < doing["generator 0"].seconds < 60
        text = view(status)
        assert f"{path}: running, last record " in line_of(text, "run ")
        assert ", 3 groups, key-value cache 25%" in line_of(text, "generator 0") and "controller" not in text
        assert line_of(text, "faults") == "1 generator lost"
        assert len(text.splitlines()) < 24
        process.kill()
        process.wait(60)
        status = read_status(path)
    assert (status.state, status.end_at) == ("ended", None)
    assert {member.name for member in status.doing} == {"learner", "generator 0"}
    assert "when the process died" in view(status)
    json.dumps(status.record())


def age(run: Path, seconds: float) -> None:
    """Let all records be so old."""
    for file in [*run.glob("*.jsonl"), run / "notes.log"]:
        os.utime(file, (time.time() - seconds, time.time() - seconds))


def held(run: Path) -> Any:
    return only_writer(config(run, run={"dir": str(run), "num_steps": 8}))


def test_a_run_that_records_nothing_for_long_hangs(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", num_steps=4, finished=False)
    age(run, 30)
    with held(run):
        assert read_status(run).state == "running"
        age(run, 3600)
        status = read_status(run)
        assert status.state == "hanging" and status.end_at is None
        assert "hanging, last record " in view(status) and "(60 min ago)" in view(status)
        now_file = NowFile(run, {"controller": (activity := Activity())}, print, every_s=0.01)
        activity.enter(0, "connect")  # it has just been resumed
        while not read_status(run).doing:
            time.sleep(0.01)
        assert read_status(run).state == "running"
        now_file.close()


def test_a_run_that_ended_early_tells_why(tmp_path: Path) -> None:
    status = read_status(write_run(tmp_path / "run", num_steps=4, finished=False))
    assert (status.state, status.step, status.num_steps, status.doing) == ("ended", 4, 8, [])
    assert "ended by ClusterError: an engine was lost" in line_of(view(status), "last note")


def test_a_finished_run(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", num_steps=4)
    (run / "config.yaml").write_text("run: {num_steps: 4}\n")
    status = read_status(run)
    assert status.state == "finished" and status.pace is not None
    assert (status.pace.num_steps, status.pace.step_s, status.pace.steps_per_min) == (4, 2.5, 24.0)
    text = view(status)
    assert line_of(text, "rates").startswith("24 steps/min, 2.5 s a step, ") and "last note" not in text
    assert line_of(text, "staleness") == "1.0 steps, at most 2" and line_of(text, "faults") == "none"


def test_the_end_is_estimated_by_the_median_of_the_last_steps(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", num_steps=30, finished=False)
    (run / "config.yaml").write_text("run: {num_steps: 130}\n")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line["time/step_s"] = 1000.0 if line["step"] in (5, 25) else 6.0  # one is too old, one an exception
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with held(run):
        status = read_status(run)
        assert status.end_at is not None and status.last_step_at is not None
        assert status.end_at == pytest.approx(status.last_step_at + 600)
        assert line_of(view(status), "end").endswith("in 10 min")
        age(run, 30)  # the present step takes longer: it may end now
        assert (late := read_status(run)).end_at == pytest.approx(late.at + 99 * 6)


def test_many_members_are_counted(tmp_path: Path) -> None:
    status = read_status(write_run(tmp_path / "run"))
    members = [Member(f"generator {i}", "lost" if i == 700 else "busy", 40.0 + (i == 700), 3, 0.1) for i in range(1024)]
    text = view(replace(status, state="running", doing=members, doing_at=status.at))
    assert line_of(text, "generators") == "1,023 busy, 1 lost; longest: generator 700 lost for 41 s"
    assert len(text.splitlines()) < 12


def test_a_ledger_that_cannot_be_read_is_told_and_the_rest_is_shown(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "ledger.sqlite").write_bytes(b"not a database, but long enough to be looked at" * 99)
    status = read_status(run)
    assert status.version is None and line_of(view(status), "ledger") == "file is not a database"
    assert "version unknown" in view(status)
    (run / "ledger.sqlite").unlink()
    Ledger(run / "ledger.sqlite").close()
    assert read_status(run).version == 0
    with closing(sqlite3.connect(run / "ledger.sqlite")) as other:
        (version,) = other.execute("PRAGMA user_version").fetchone()
        other.execute("PRAGMA user_version=99")
        assert "is a ledger of version 99" in line_of(view(read_status(run)), "ledger")
        other.execute(f"PRAGMA user_version={version}")
    with closing(sqlite3.connect(run / "ledger.sqlite", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")  # as the run itself does all the time
        assert read_status(run).version == 0


def test_json_has_no_numbers_that_json_does_not_have(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    last = json.loads(lines[-1]) | {"reward/mean": math.nan}
    (run / "metrics.jsonl").write_text("\n".join([*lines[:-1], json.dumps(last)]) + "\n")
    assert "NaN" not in json.dumps(read_status(run).record())


def test_a_run_on_another_machine_is_seen_without_its_ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its lock may not be seen here either."""
    run = write_run(tmp_path / "run", num_steps=4, finished=False)
    (run / "config.yaml").write_text(dump_config(config(run)))
    with closing(Ledger(run / "ledger.sqlite")), monkeypatch.context() as patch:
        patch.setattr("socket.gethostname", lambda: "elsewhere")
        tell_host(run / "ledger.sqlite")
        now_file = NowFile(run, {}, print, every_s=0.01)
        while read_now(run) is None:
            time.sleep(0.01)
        now_file._is_closed.set()  # it is killed
        now_file._thread.join()
        now = json.loads((run / "now.json").read_text())
        (run / "now.json").write_text(json.dumps(now | {"clock_s": time.time() + 600}))  # this test may take its time
        patch.undo()  # not before: the thread would write the name of this machine
        status = read_status(run)
        assert (status.state, status.step, status.version) == ("running", 4, None)
        assert "is in use on elsewhere, and can be read only there" in line_of(view(status), "ledger")
        with pytest.raises(LedgerUnreadable, match="is in use on elsewhere"):
            audit_run(run)
        (run / "now.json").write_text(json.dumps(now | {"clock_s": time.time() - 11}))
        assert (ended := read_status(run)).state == "ended" and ended.version == 0


def test_another_directory_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no run, as it has no config\.yaml; give the run\.dir of a run"):
        read_status(tmp_path)


def test_a_run_that_only_has_its_configuration(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("run: {num_steps: 9}\n")
    status = read_status(tmp_path)
    assert (status.state, status.step, status.pace, status.last_record_at) == ("ended", 0, None, 0.0)
    assert "ended, no record yet" in view(status)


def test_it_is_shown_again_until_the_run_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run", num_steps=4, finished=False)
    lock = held(run)
    lock.__enter__()
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) % 2 == 0:
            lock.__exit__(None, None, None)

    monkeypatch.setattr(status_view.time, "sleep", sleep)
    capsys.readouterr()
    show_status(run, as_json=True, every_s=7.0)
    shown = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [s["state"] for s in shown] == ["running", "running", "ended"] and waits == [7.0, 7.0]
    lock = held(run)
    lock.__enter__()
    terminal = Console(file=io.StringIO(), force_terminal=True, width=200)
    show_status(run, as_json=False, every_s=7.0, console=terminal)
    assert "ended" in terminal.file.getvalue()  # type: ignore[attr-defined]
    assert len(waits) == 4 and not capsys.readouterr().out


def test_a_look_does_not_keep_a_run_from_starting(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    assert not is_in_use(run)
    for _ in range(20):
        with held(run):
            assert is_in_use(run)
        assert not is_in_use(run)
