"""Engines beyond `generator.num_engines` join when there is room, and again after their node was lost."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

from tests.unit.world import World, audit


def elastic(path: Path, room: Callable[[World, int], Awaitable[None]]) -> World:
    generator = {"num_engines": 1, "max_engines": 3, "max_groups_in_flight": 4}
    world = World(path, run={"num_steps": 60}, generator=generator)
    world.room = lambda index: room(world, index)
    return world


async def until_step(world: World, step: int) -> None:
    while world.controller.step < step:
        await asyncio.sleep(0.01)


def test_each_joins_when_there_is_room(tmp_path: Path) -> None:
    async def room(world: World, index: int) -> None:
        await until_step(world, 5 * index)

    world = elastic(tmp_path / "r", room)
    world.run()
    audit(world)
    assert [e["part"] for e in world.events("joined")] == ["generator 1", "generator 2"]
    assert not world.events("recovered") and not world.events("lost")
    healthy = [m["health/engines"] for m in world.metrics()]
    assert healthy[0] == 1 and healthy[-1] == 3 and healthy == sorted(healthy)
    assert all(generator.seeds for generator in world.generators)


def test_the_run_does_not_wait_for_them(tmp_path: Path) -> None:
    async def room(world: World, index: int) -> None:
        if index:
            await asyncio.sleep(1e9)

    world = elastic(tmp_path / "r", room)
    world.run()
    audit(world)
    assert len(world.generators) == 1 and not world.events("joined")


def test_one_whose_node_is_lost_comes_back_when_there_is_room_again(tmp_path: Path) -> None:
    """However long that takes: it is not given up meanwhile."""
    asked: list[int] = []

    async def room(world: World, index: int) -> None:
        asked.append(index)
        if index and asked.count(index) == 2:
            await until_step(world, 40)

    async def lose(world: World) -> None:
        await until_step(world, 10)
        world.fleet.lost(world.fleet.slots[2], "its node is gone")

    world = elastic(tmp_path / "r", room)
    world.faults = lose
    world.run()
    audit(world)
    healthy = [m["health/engines"] for m in world.metrics()]
    assert healthy[15] == healthy[35] == 2 and healthy[-1] == 3
    assert [e["part"] for e in world.events("recovered")] == ["generator 2"]
    assert not world.events("given_up")
