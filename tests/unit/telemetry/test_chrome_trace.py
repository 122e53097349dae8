"""The trace of a run: what Perfetto's importer needs of each event, and that none of the timeline is lost."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from quatro_ray.errors import ConfigError
from quatro_ray.telemetry.chrome_trace import write_trace
from quatro_ray.telemetry.console import Progress
from quatro_ray.telemetry.recorder import Recorder
from tests.unit.telemetry.run_maker import write_run
from tests.unit.world import World, lose_an_engine

NEEDED = {"X": {"ts", "dur"}, "C": {"ts", "args"}, "i": {"ts", "s"}, "M": {"args"}}


def events_of(run_dir: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    trace = json.loads(write_trace(run_dir, Counter()).read_text(), parse_constant=refuse)
    assert set(trace) == {"displayTimeUnit", "traceEvents"}
    return list(trace["traceEvents"])


@pytest.fixture(scope="module")
def events(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Those of a whole run of the controller, in which an engine is lost."""
    world = World(tmp_path_factory.mktemp("run") / "r", generator={"num_engines": 3}, evaluation={"every_steps": 4})
    world.faults = lose_an_engine
    world.run()
    (world.config.run.dir / "config.yaml").write_text("run: {num_steps: 12}\n")
    return events_of(world.config.run.dir)


def test_every_event_has_what_its_kind_needs(events: list[dict[str, Any]]) -> None:
    for event in events:
        assert set(event) >= {"ph", "pid", "tid", "name"} | NEEDED[event["ph"]]
        assert isinstance(event["pid"], int) and isinstance(event["tid"], int)
        assert event.get("ts", 0) >= 0 and event.get("dur", 0) >= 0


def test_every_thread_has_a_name_and_each_step_and_loss_is_marked(events: list[dict[str, Any]]) -> None:
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert set(names.values()) >= {"learner", "generator 0", "generator 1", "generator 2"}
    assert {(e["pid"], e["tid"]) for e in events} == set(names)
    assert len(set(names.values())) == len(names)
    marks = [e["name"] for e in events if e["ph"] == "i"]
    assert {f"step {k}" for k in range(1, 13)} <= set(marks)
    assert "generator 1: lost" in marks


def test_what_one_member_does_follows_one_after_the_other(events: list[dict[str, Any]]) -> None:
    """On one thread Perfetto would draw what overlaps as if one were called by the other."""
    spans = defaultdict(list)
    for e in events:
        if e["ph"] == "X":
            spans[e["pid"], e["tid"]].append((e["ts"], e["ts"] + e["dur"]))
    assert len(spans[1, 0]) > 24  # the learner's
    for found in spans.values():
        ordered = sorted(found)
        assert all(end <= start + 1 for (_, end), (start, _) in pairwise(ordered))


def test_a_number_that_is_not_finite_is_left_out(tmp_path: Path) -> None:
    path = write_run(tmp_path / "r")
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "time_s": 9.0, "policy/loss": NaN, "step/grad_norm": Infinity}\n')
    assert {e["name"]: e for e in events_of(path)}["step 3"]["args"] == {"step": 3, "time_s": 9.0}


def test_the_earlier_part_of_a_long_timeline_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a resumed run goes on from the last time in it."""
    monkeypatch.setattr("quatro_ray.telemetry.recorder._MAX_TIMELINE_BYTES", 1000)
    path = write_run(tmp_path / "r")

    def record(num: int) -> float:
        recorder = Recorder(path, num_steps=2, progress=Progress())
        for _ in range(num):
            with recorder.phase("learner", "train"):
                pass
        begun = recorder.now()
        recorder.close()
        return begun

    times = [record(n) for n in (5, 20, 1)]
    assert times == sorted(times)
    sizes = [(path / name).stat().st_size for name in ("timeline.jsonl", "timeline.1.jsonl")]
    assert all(size < 1200 for size in sizes) and sizes[1] > 1000
    starts = [e["ts"] for e in events_of(path) if e["ph"] == "X"]
    assert starts == sorted(starts) and len(starts) > 9


def test_a_folder_without_a_run_and_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no run"):
        write_trace(tmp_path, Counter())
    run = write_run(tmp_path / "r")
    with pytest.raises(ConfigError, match=r"cannot be written: No such file or directory; give another path"):
        write_trace(run, Counter(), tmp_path / "nowhere" / "trace.json")
