"""A node that is going away: its engines get no new groups, and a checkpoint is written before it goes."""

from __future__ import annotations

import asyncio
from pathlib import Path

from tests.unit.world import World, audit


def drained(path: Path, indices: list[int]) -> tuple[World, list[int]]:
    """Run with a node that is drained after three steps; return how many groups each engine had 10 s later."""
    world = World(path, checkpoint={"every_steps": 1000}, run={"num_steps": 40})
    later: list[int] = []

    async def drain(world: World) -> None:
        while world.controller.step < 3:
            await asyncio.sleep(0.01)
        world.draining = {"n1": indices}
        await asyncio.sleep(10)
        later.extend(slot.num_groups for slot in world.fleet.slots)

    world.faults = drain
    world.run()
    audit(world)
    assert len(later) == 2
    return world, later


def test_other_engines_get_the_groups_and_a_checkpoint_is_written(tmp_path: Path) -> None:
    world, (first, second) = drained(tmp_path, [1])
    assert first > 0 and second == 0
    (event,) = world.events("draining")
    assert (event["part"], event["engines"]) == ("node n1", [1])
    early, *_, last = [event["step"] for event in world.events("written") if event["part"] == "checkpoint"]
    assert 3 <= early < 10 and last == 40
    assert not world.events("lost")


def test_engines_that_are_all_on_nodes_that_go_keep_working(tmp_path: Path) -> None:
    _, loads = drained(tmp_path, [0, 1])
    assert all(loads)


def test_a_node_without_engines_may_have_ranks(tmp_path: Path) -> None:
    world, loads = drained(tmp_path, [])
    assert all(loads)
    assert len([e for e in world.events("written") if e["part"] == "checkpoint"]) == 2
