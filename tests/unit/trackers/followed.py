"""A recorder with trackers in their own processes, and callbacks that fail in the ways in which clients do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from quatro_ray.config import Config
from quatro_ray.telemetry.console import Progress
from quatro_ray.telemetry.recorder import Recorder
from quatro_ray.telemetry.tracker import Outcome
from quatro_ray.trackers.processes import TrackerProcesses
from quatro_ray.types import StepMetrics
from tests import make
from tests.children import none_left

METRICS: StepMetrics = {
    "reward/mean": 0.5,
    "policy/realised_kl_nats": [0.5],
    "policy/entropy": 1.0,
    "off_policy/staleness_mean": 2.0,
    "off_policy/staleness_max": 3,
    "rollout_corr/logprob_abs_diff": None,
    "step/skipped": 0.0,
}
CALLBACK = '''
import json, os, time
from pathlib import Path
from quatro_ray.telemetry.tracker import Tracker

class Kept(Tracker):
    """Writes each call as a line, and does what the test says."""

    def on_start(self, run):
        self.dir = run.dir
        self.write("start", run.name, run.id)
        return "the id"

    def on_step(self, step, metrics):
        self.at(step)
        self.write("step", step, metrics["reward/mean"])

    def on_evaluation(self, step, name, result):
        self.write("evaluation", step, name, result["pass_at_1"])

    def on_checkpoint(self, step, path):
        self.write("checkpoint", step, path)

    def on_rewind(self, step):
        self.write("rewind", step)

    def on_end(self, outcome):
        self.write("end", outcome)

    def write(self, *line):
        with open(self.dir / "calls", "a") as file:
            print(json.dumps(line), file=file)

    def first_time(self):
        marker = self.dir / "was_here"
        if marker.exists():
            return False
        marker.touch()
        return True

    def at(self, step):
        pass
'''


def config(run_dir: Path, **telemetry: Any) -> Config:
    run_dir.mkdir(exist_ok=True)
    return make.config(run_dir, telemetry={"trackers": [], "tracker_deadline_s": 60} | telemetry)


def callback(folder: Path, code: str) -> str:
    """Write a subclass `Mine` of `Kept`, and return its import path. `code`: its methods."""
    file = folder / "callbacks.py"
    file.write_text(f"{CALLBACK}\nclass Mine(Kept):\n{code}")
    return f"{file}:Mine"


@contextmanager
def followed(made: Config, outcome: Outcome = "finished") -> Iterator[Recorder]:
    """A recorder with the trackers of a configuration, which is closed at the end and leaves no process."""
    with none_left():
        recorder = Recorder(made.run.dir, num_steps=9, progress=Progress(in_place=False))
        recorder.follow_with(TrackerProcesses(made, recorder))
        yield recorder
        recorder.close(outcome)


def step(recorder: Recorder, number: int, reward: float = 0.5) -> None:
    recorder.step(number, METRICS | {"reward/mean": reward}, [])


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def calls(run_dir: Path, *kinds: str) -> list[Any]:
    """The calls that the callback has written, those of some kinds only if any are given."""
    return [call for call in lines(run_dir / "calls") if not kinds or call[0] in kinds]


def events(run_dir: Path) -> list[tuple[str, str]]:
    return [(e["event"], e["part"].split(":")[-1]) for e in lines(run_dir / "events.jsonl")]
