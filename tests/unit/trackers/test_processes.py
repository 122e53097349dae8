"""What a tracker or callback does, or fails to do, neither stops nor delays the run, and is counted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from quatro_ray.telemetry.evaluation_result import EvaluationResult
from tests.unit.trackers.followed import callback, calls, config, events, followed, lines, step

pytestmark = pytest.mark.process


def lost(run_dir: Path) -> int:
    """Records that were said to be lost."""
    return sum(e["lost_records"] for e in lines(run_dir / "events.jsonl") if e["event"] == "incomplete")


def test_every_call_arrives_in_order(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with followed(config(run_dir, callbacks=[callback(tmp_path, "    pass")], run_name="mine")) as recorder:
        recorder.evaluation(EvaluationResult("sums", 0, 0, 4, 8, {1: 0.25}, 0.5, {}, 3, 0.4, 0.0, 64))
        step(recorder, 1, 0.1)
        recorder.checkpoint(1, 1, run_dir / "step_1")
        step(recorder, 2, 0.2)
        recorder.rewind(1, {0})
        step(recorder, 2, 0.3)
    assert calls(run_dir) == [
        ["start", "mine", None],
        ["evaluation", 0, "sums", 0.25],
        ["step", 1, 0.1],
        ["checkpoint", 1, str(run_dir / "step_1")],
        ["step", 2, 0.2],
        ["rewind", 1],
        ["step", 2, 0.3],
        ["end", "finished"],
    ]
    assert events(run_dir) == [("written", "checkpoint")]


@pytest.mark.parametrize("outcome", ["finished", "stopped", "failed"])
def test_it_learns_how_the_run_ended(tmp_path: Path, outcome: str) -> None:
    with followed(config(tmp_path / "run", callbacks=[callback(tmp_path, "    pass")]), outcome):  # type: ignore[arg-type]
        pass
    assert calls(tmp_path / "run", "end") == [["end", outcome]]


def test_a_resumed_run_goes_on_under_its_id(tmp_path: Path) -> None:
    made = config(tmp_path / "run", callbacks=[callback(tmp_path, "    pass")])
    for _ in range(2):
        with followed(made):
            pass
    assert [call[2] for call in calls(made.run.dir, "start")] == [None, "the id"]
    (made.run.dir / "trackers.json").write_text("{")
    with followed(made):
        pass
    assert calls(made.run.dir, "start")[-1] == ["start", "run", None]
    assert events(made.run.dir) == [("damaged", "trackers.json")]


def test_one_error_costs_one_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = "    def at(self, step):\n        if step == 2:\n            raise KeyError('nothing')\n"
    made = config(tmp_path / "run", callbacks=[callback(tmp_path, code)])
    with followed(made) as recorder:
        for number in (1, 2, 3):
            step(recorder, number)
    assert [call[1] for call in calls(made.run.dir, "step")] == [1, 3]
    assert events(made.run.dir) == [("failed", "Mine"), ("incomplete", "Mine")]
    assert lost(made.run.dir) == 1
    shown = capsys.readouterr().out
    assert "Mine: failed (why on_step raised KeyError: 'nothing' (" in shown and "callbacks.py:" in shown
    assert "Mine: incomplete (lost_records 1)" in shown


def test_after_ten_errors_in_a_row_it_gets_no_more_calls(tmp_path: Path) -> None:
    made = config(tmp_path / "run", callbacks=[callback(tmp_path, "    def at(self, step): raise ValueError(step)")])
    with followed(made) as recorder:
        for number in range(1, 16):
            step(recorder, number)
    assert events(made.run.dir) == [("failed", "Mine"), ("given_up", "Mine"), ("incomplete", "Mine")]
    assert lost(made.run.dir) == 15
    notes = (made.run.dir / "notes.log").read_text()
    assert "10 calls in a row failed; the last: on_step raised ValueError: 10" in notes
    assert calls(made.run.dir, "end") == []


def test_one_that_cannot_be_made_is_told_and_given_up(tmp_path: Path) -> None:
    code = "    def __init__(self): raise OSError('no account')\n"
    made = config(tmp_path / "run", callbacks=[callback(tmp_path, code)])
    with followed(made) as recorder:
        for number in range(1, 12):
            step(recorder, number)
    assert lines(made.run.dir / "events.jsonl")[0]["why"].startswith("on_start: making it raised OSError: no account")
    assert lost(made.run.dir) == 11


def test_one_that_blocks_is_replaced_and_the_run_goes_on_in_it(tmp_path: Path) -> None:
    code = "    def at(self, step):\n        if step == 2 and self.first_time():\n            time.sleep(3600)\n"
    made = config(tmp_path / "run", callbacks=[callback(tmp_path, code)], tracker_deadline_s=10)
    with followed(made) as recorder:
        for number in (1, 2):
            step(recorder, number)
        while ("failed", "Mine") not in events(made.run.dir):  # the run's own end has a deadline too
            time.sleep(0.05)
        step(recorder, 3)
        while ["step", 3, 0.5] not in calls(made.run.dir):  # a new process starts for it
            time.sleep(0.05)
    assert calls(made.run.dir) == [
        ["start", "run", None],
        ["step", 1, 0.5],
        ["start", "run", "the id"],
        ["step", 3, 0.5],
        ["end", "finished"],
    ]
    assert "on_step: missed its deadline of 10 s" in (made.run.dir / "notes.log").read_text()
    assert lost(made.run.dir) == 1


def test_one_that_exits_or_crashes_is_replaced(tmp_path: Path) -> None:
    code = (
        "    def at(self, step):\n"
        "        if step == 2 and self.first_time():\n"
        "            os.kill(os.getpid(), 11)\n"
        "        if step == 3 and len(open(self.dir / 'calls').readlines()) < 4:\n"
        "            raise SystemExit(0)\n"
    )
    made = config(tmp_path / "run", callbacks=[callback(tmp_path, code)])
    with followed(made) as recorder:
        for number in range(1, 6):
            step(recorder, number)
    assert [call[1] for call in calls(made.run.dir, "step")] == [1, 4, 5]
    assert lost(made.run.dir) == 2


def test_training_does_not_wait_and_what_finds_no_room_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The callback waits for a file that is there only after all steps were recorded."""
    monkeypatch.setattr("quatro_ray.trackers.process._MAX_WAITING", 5)
    code = "    def at(self, step):\n        while not (self.dir / 'all').exists(): time.sleep(0.01)\n"
    made = config(tmp_path / "run", callbacks=[callback(tmp_path, code)])
    with followed(made) as recorder:
        for number in range(1, 21):
            step(recorder, number)
        (made.run.dir / "all").touch()
    assert [call[1] for call in calls(made.run.dir, "step")] == [1, 2, 3, 4, 5]
    assert lost(made.run.dir) == 15
    assert events(made.run.dir) == [("failed", "Mine"), ("incomplete", "Mine")]


def test_the_end_has_a_deadline(tmp_path: Path) -> None:
    code = "    def on_end(self, outcome): time.sleep(3600)\n"
    made = config(tmp_path / "run", callbacks=[callback(tmp_path, code)], tracker_deadline_s=5)
    with followed(made) as recorder:
        step(recorder, 1)
    # both have the same deadline: that of the call, and that of the end
    assert events(made.run.dir)[0] in [("given_up", "Mine"), ("failed", "Mine")]


def test_after_a_signal_the_end_does_not_take_the_whole_deadline(tmp_path: Path) -> None:
    code = "    def on_end(self, outcome): time.sleep(3600)\n"
    made = config(tmp_path / "run", callbacks=[callback(tmp_path, code)], tracker_deadline_s=3600)
    with followed(made, "stopped") as recorder:
        step(recorder, 1)
        while not calls(made.run.dir, "step"):
            time.sleep(0.05)
    assert "it did not end within 5 s" in (made.run.dir / "notes.log").read_text()
    assert lost(made.run.dir) == 0


def test_what_is_not_done_by_the_end_is_counted(tmp_path: Path) -> None:
    made = config(tmp_path / "run", callbacks=[callback(tmp_path, "    def at(self, step): time.sleep(3600)")])
    with followed(made, "stopped") as recorder:
        step(recorder, 1)
        step(recorder, 2)
    assert lost(made.run.dir) == 2


def test_one_failing_tracker_costs_the_others_nothing(tmp_path: Path) -> None:
    path = callback(tmp_path, "    def at(self, step): raise ValueError\n")
    made = config(tmp_path / "run", callbacks=[path, path.replace(":Mine", ":Kept")])
    with followed(made) as recorder:
        for number in range(1, 13):
            step(recorder, number)
    assert [call[1] for call in calls(made.run.dir, "step")] == list(range(1, 13))


def test_what_it_prints_is_noted_without_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", "s3cr3t-value")
    code = (
        "    def at(self, step):\n"
        "        print('printed', os.environ['MY_API_KEY'])\n"
        "        raise ValueError(os.environ['MY_API_KEY'])\n"
    )
    made = config(tmp_path / "run", callbacks=[callback(tmp_path, code)])
    with followed(made) as recorder:
        step(recorder, 1)
    notes = (made.run.dir / "notes.log").read_text()
    assert "Mine printed: printed ***" in notes and "ValueError: ***" in notes
    assert not any("s3cr3t-value" in file.read_text() for file in made.run.dir.iterdir() if file.is_file())


def test_what_it_has_started_ends_with_it_and_ctrl_c_does_not_reach_it(tmp_path: Path) -> None:
    code = (
        "    def on_start(self, run):\n"
        "        import subprocess\n"
        "        service = subprocess.Popen(['sleep', '3600'], start_new_session=True)\n"
        "        (run.dir / 'pids').write_text(f'{os.getpid()} {service.pid} {os.getsid(0)}')\n"
    )
    made = config(tmp_path / "run", callbacks=[callback(tmp_path, code)])
    with followed(made):  # fails if anything is left
        pass
    *_, session = map(int, (made.run.dir / "pids").read_text().split())
    assert session != os.getsid(0)


PROGRAM = """
import sys, time
from pathlib import Path
from tests.unit.trackers.followed import config, followed, step
with followed(config(Path(sys.argv[1]), callbacks=[sys.argv[2]])) as recorder:
    step(recorder, 1)
    while not (Path(sys.argv[1]) / "pids").exists():
        time.sleep(0.01)
    print("ready", flush=True)
    time.sleep(3600)
"""


def test_nothing_is_left_when_the_run_is_killed(tmp_path: Path) -> None:
    code = (
        "    def at(self, step):\n"
        "        import subprocess\n"
        "        service = subprocess.Popen(['sleep', '3600'], start_new_session=True)\n"
        "        (self.dir / 'writing').write_text(f'{os.getpid()} {os.getppid()} {service.pid}')\n"
        "        (self.dir / 'writing').rename(self.dir / 'pids')\n"
    )
    path = callback(tmp_path, code)
    run = subprocess.Popen([sys.executable, "-c", PROGRAM, str(tmp_path / "run"), path], stdout=subprocess.PIPE)
    assert run.stdout is not None and b"ready\n" in iter(run.stdout.readline, b"")
    left = [psutil.Process(int(pid)) for pid in (tmp_path / "run" / "pids").read_text().split()]
    run.send_signal(signal.SIGKILL)
    run.communicate()
    assert psutil.wait_procs(left, timeout=60)[1] == []
