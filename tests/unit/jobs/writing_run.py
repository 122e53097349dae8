"""A process that trains nothing, and writes all that a run writes: `python -m tests.unit.jobs.writing_run RUN_DIR`.

It prints each step, and makes steps until it is killed or its standard input ends.
"""

from __future__ import annotations

import random
import select
import sys
import time
from pathlib import Path

from quatro_ray.config import Config
from quatro_ray.jobs.run_directory import claim_run_dir
from quatro_ray.replay.buffer import ReplayBuffer
from quatro_ray.telemetry.activity import Activity
from quatro_ray.telemetry.console import Progress
from quatro_ray.telemetry.now_file import NowFile
from quatro_ray.telemetry.recorder import Recorder
from quatro_ray.types import EngineLoad
from tests.make import config
from tests.unit.replay.buffers import to_ready
from tests.unit.telemetry.run_maker import step_metrics

NUM_STEPS = 10_000


def config_of(run_dir: Path) -> Config:
    return config(
        run_dir,
        run={"dir": str(run_dir), "num_steps": NUM_STEPS, "resume": "auto"},
        replay={"groups_per_step": 2, "group_size": 2, "max_staleness": 1},
        telemetry={"rollout_groups_per_step": 2},
    )


def main(run_dir: Path) -> None:
    loaded = config_of(run_dir)
    with claim_run_dir(loaded):
        recorder = Recorder(run_dir, num_steps=NUM_STEPS, progress=Progress(), clock=time.monotonic)
        engines = Activity()
        recorder.watch("generators", engines)
        engines.enter(0, "busy")
        now_file = NowFile(run_dir, recorder.roles, recorder.note, every_s=0.1)
        buffer = ReplayBuffer(loaded.replay, run_dir / "ledger.sqlite", num_steps=NUM_STEPS)
        recorder.event("lost", "generator 0", why="its process was killed")
        while not select.select([sys.stdin], [], [], 0)[0]:
            version = buffer.ledger.versions.newest()
            to_ready(buffer, 2, version)
            summary, batch = buffer.lease(version, num_samples=2)
            assert summary is not None and batch is not None
            with recorder.phase("learner", "train"):
                time.sleep(0.02)
            buffer.commit(version)
            made = step_metrics(random.Random(version), version + 1, list(batch.groups))
            kept = {name: value for name, value in made.items() if not name.startswith("drops/")}
            recorder.engine_load(0, EngineLoad(3, 10, 12, is_alive=True, kv_cache_usage=0.25))
            recorder.step(version + 1, kept | summary.metrics, summary.samples)
            print("made", version + 1, flush=True)
        now_file.close()
        recorder.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
