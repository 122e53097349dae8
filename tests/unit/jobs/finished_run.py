"""A finished run, whose files the real controller, buffer and recorder wrote."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from quatro_ray.config import dump_config
from quatro_ray.jobs.train import summarise
from quatro_ray.telemetry.counters import Counters
from tests.unit.faults import make_world
from tests.unit.world import World


def write_config(world: World) -> None:
    (world.config.run.dir / "config.yaml").write_text(dump_config(world.config))


def write_finished_run(path: Path) -> Path:
    """Write a run of 12 steps of 4 groups, which lost its learner after step 7, and three steps with it."""
    sections = {"filters": {"max_truncated_share": 0.5}, "telemetry": {"rollout_groups_per_step": 4}}
    world = make_world(path, **sections, replay={"keep_steps": [3]})
    world.verifiers.truncated = {9, 14, 30}
    write_config(world)

    async def faults(world: World) -> None:
        while world.controller.step < 7:
            await asyncio.sleep(0.05)
        world.learner.lost = "a rank was killed"

    world.faults = faults
    write_summary(world, world.run(failing={20}))
    world.buffer.ledger.close()
    return path


def write_summary(world: World, counters: Counters) -> None:
    summary = summarise(counters, world.buffer.stats(), {}, {}, {})
    (world.config.run.dir / "summary.json").write_text(json.dumps(summary))
