"""Files that are added to, on a disk that is really full, and after a writer that died."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.faults.disk import Disk
from quatro_ray.telemetry.append_log import AppendLog, last_lines
from quatro_ray.telemetry.console import Progress
from quatro_ray.telemetry.recorder import Recorder
from quatro_ray.types import EngineLoad, StepMetrics


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """A tmpfs of one MiB."""
    made = Disk(tmp_path / "disk", 2**20)
    try:
        made.mount()
    except OSError as error:  # who is not root, or is in a container, may not
        pytest.skip(f"no disk to fill: {error}")
    yield made
    made.free()
    made.unmount()


def test_lines_wait_for_room_and_none_is_cut(disk: Disk) -> None:
    file = AppendLog(disk.path / "lines")
    file.write("first")
    disk.fill(leave_bytes=0)
    lines = [f"{i} " + "x" * 1000 for i in range(100)]
    for line in lines:
        file.write(line)
    assert file.num_waiting > 0
    disk.free()
    file.write("last")
    assert file.num_waiting == 0 and file.num_dropped == 0
    file.close()
    assert (disk.path / "lines").read_text().splitlines() == ["first", *lines, "last"]


def test_what_waits_has_a_bound(disk: Disk) -> None:
    file = AppendLog(disk.path / "lines")
    disk.fill(leave_bytes=0)
    for _ in range(20):
        file.write("x" * 2**20)
    assert file.num_dropped == 5


def test_a_line_that_was_cut_off_goes_when_the_file_is_opened(tmp_path: Path) -> None:
    (tmp_path / "lines").write_text('{"a": 1}\n{"a": ')
    file = AppendLog(tmp_path / "lines")
    file.write('{"a": 2}')
    file.close()
    assert (tmp_path / "lines").read_text() == '{"a": 1}\n{"a": 2}\n'


def test_lines_are_taken_back_without_room_for_others(disk: Disk) -> None:
    file = AppendLog(disk.path / "lines")
    for i in range(1000):
        file.write(f"{i} " + "x" * 100)
    disk.fill(leave_bytes=0)
    for i in range(1000, 1200):
        file.write(f"{i} " + "x" * 100)
    file.keep(lambda line: int(line.split()[0]) < 1100)  # of those that wait, some
    file.keep(lambda line: int(line.split()[0]) < 700)
    file.write("700")
    assert file.num_waiting == 0  # there is room again
    file.keep(lambda line: int(line.split()[0]) % 7 == 0)
    file.close()
    kept = [int(line.split()[0]) for line in (disk.path / "lines").read_text().splitlines()]
    assert kept == list(range(0, 701, 7))


def test_a_full_disk_is_told_once_and_ends_nothing(disk: Disk, capsys: pytest.CaptureFixture[str]) -> None:
    path = disk.path / "run"
    path.mkdir()
    recorder = Recorder(path, num_steps=10, progress=Progress())
    disk.fill(leave_bytes=0)
    for index in range(3000):
        recorder.engine_load(0, EngineLoad(index, 0, 0, is_alive=True))
        recorder.note(f"note {index}")
    with recorder.phase("learner", "train"):
        recorder.event("lost", "generator 0", why="it was killed")
    assert capsys.readouterr().out.count("the disk of run.dir is full: records wait") == 1
    disk.free()
    recorder.note("room again")
    recorder.engine_load(0, EngineLoad(-1, 0, 0, is_alive=True))
    recorder.close()
    assert "could not be written" not in capsys.readouterr().out
    assert len((path / "timeline.jsonl").read_text().splitlines()) == 3002
    assert (path / "notes.log").read_text().splitlines()[-1].endswith("room again")


METRICS: StepMetrics = {
    "reward/mean": 0.5,
    "policy/realised_kl_nats": [0.5],
    "policy/entropy": 1.0,
    "off_policy/staleness_mean": 2.0,
    "off_policy/staleness_max": 3,
    "step/skipped": 0.0,
    "time/step_s": 4.0,
}


def recorder(path: Path) -> Recorder:
    return Recorder(path, num_steps=9, progress=Progress(in_place=False))


def test_damaged_lines_are_left_out_when_a_run_goes_back(tmp_path: Path) -> None:
    records = recorder(tmp_path)
    for step in (1, 2, 3):
        records.step(step, METRICS, [{"text": "x" * 100_000}])
    records.close()
    for name in ("metrics", "rollouts"):
        lines = (tmp_path / f"{name}.jsonl").read_bytes().splitlines(keepends=True)
        (tmp_path / f"{name}.jsonl").write_bytes(lines[0] + bytes(4096) + b"\n" + lines[1] + b"{}\n" + lines[2])
    (tmp_path / "timeline.jsonl").write_bytes(
        b'{"role": "learner", "phase": "train", "start": 7.0, "end": 7.5}\n' + bytes(512) + b"\n"
    )
    again = recorder(tmp_path)
    assert again.now() >= 7.5
    again.rewind(2, set())
    again.close()
    for name in ("metrics", "rollouts"):
        kept = (tmp_path / f"{name}.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in kept] == [1, 2]
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [(e["event"], e["part"], e["why"][:7]) for e in events] == [
        ("damaged", "metrics.jsonl", "2 lines"),
        ("damaged", "rollouts.jsonl", "2 lines"),
    ]


@pytest.mark.parametrize("length", [1, 500, 40_000])
def test_the_last_lines_are_read_from_the_end(tmp_path: Path, length: int) -> None:
    path = tmp_path / "lines"
    assert last_lines(path, 3) == []
    lines = [f"{i}".ljust(length, "é") for i in range(10)]
    for num in range(10):
        path.write_text("".join(f"{line}\n" for line in lines[:num]) + "half of a line")
        assert last_lines(path, 3) == lines[max(0, num - 3) : num]
