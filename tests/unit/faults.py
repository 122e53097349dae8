"""Faults for tests/unit/world.py: what dies when, and a run that is started again until it is done."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from quatro_ray.errors import Preempted
from tests.unit.fake_generator import FakeGenerator
from tests.unit.world import World

FAULTS = ("engine dies", "engine hangs", "engine's core dies", "learner dies", "bit flips", "controller dies", "stop")


def schedule(faults: list[tuple[float, str, int]]) -> Any:
    """By seconds after the one before, what happens, and to which engine. Goes on in the next life of the run."""
    left = list(faults)

    async def run(world: World) -> None:
        while left:
            await asyncio.sleep(left[0][0])
            _, fault, which = left.pop(0)
            inflict(world, fault, which)

    return run


def between_steps(fault: str, which: int = 0) -> Any:
    """Once, after the first step, while the learner waits."""
    left = [fault]

    async def run(world: World) -> None:
        while world.controller.step < 1 or world.controller._learner_lock.locked():
            await asyncio.sleep(0.01)
        if left:
            inflict(world, left.pop(), which)

    return run


def kill_when(holds: Any) -> Any:
    """The controller, once."""
    left = ["controller dies"]

    async def faults(world: World) -> None:
        while not holds(world):
            await asyncio.sleep(0.01)
        if left:
            inflict(world, left.pop(), 0)

    return faults


def inflict(world: World, fault: str, which: int) -> None:
    engine = world.fleet.slots[which % len(world.fleet.slots)].client
    assert isinstance(engine, FakeGenerator)
    if fault == "engine dies":
        engine.died = engine.died or "its process was killed"
    elif fault == "engine hangs":
        engine.hung = True
    elif fault == "engine's core dies":
        engine.failures, engine.died = 0, "the engine's process died"
    elif fault in ("learner dies", "bit flips"):
        if fault == "bit flips":
            damage_newest(world)
        world.learner.lost = "a rank was killed"
    elif fault == "stop":
        world.controller.stop()
    else:
        for task in asyncio.all_tasks():
            if "Controller.run" in repr(task):
                task.cancel("killed")


def damage_newest(world: World) -> None:
    """If there is another one: a run without any that is whole ends, and is not to."""
    steps = (world.config.run.dir / "checkpoints").glob("step_*/weights")
    found = sorted((p for p in steps if p.parent.name[5:].isdigit()), key=lambda p: int(p.parent.name[5:]))
    if len(found) > 1:
        found[-1].write_text(found[-1].read_text() + "1")


def run_to_the_end(world: World) -> int:
    """As a cluster does it: the same command again, as long as it ends early. Returns how often that was."""
    for ended in range(100):
        try:
            world.run(resume=ended > 0)
            return ended
        except (Preempted, asyncio.CancelledError):
            pass
    raise AssertionError("the run never ends")


def make_world(path: Path, **sections: Any) -> World:
    # beside the run directory, where a controller of its own life finds it again
    path.mkdir(parents=True, exist_ok=True)
    return World(
        path,
        ledger=path / "ledger.sqlite",
        checkpoint={"every_steps": 4},
        generator={"num_engines": 2, "max_groups_in_flight": 4, "max_restarts": 50, "progress_deadline_s": 20,
                   "max_engines_lost": 50},
        learner={"max_restarts": 50},
        cluster={"liveness_deadline_s": 10},
        **sections,
    )  # fmt: skip
