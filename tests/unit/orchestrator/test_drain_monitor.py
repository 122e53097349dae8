"""A node that is going away: its engines get no new groups, and a checkpoint is written before it goes."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, cast

import pytest

from quatro_ray.failures import LearnerLost
from quatro_ray.orchestrator.drain_monitor import DrainMonitor
from quatro_ray.simulation.virtual_loop import VirtualLoop
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


class Parts:
    """What a drain monitor calls; each write of a checkpoint takes a minute."""

    def __init__(self) -> None:
        self.nodes: dict[str, list[int]] | None = {}
        self.drained: set[int] = set()
        self.announced: list[str] = []
        self.num_begun, self.num_written, self.num_cancelled = 0, 0, 0
        self.error: Exception | None = None
        self.monitor = DrainMonitor(self.notice, cast(Any, self), cast(Any, self), cast(Any, self))

    async def notice(self) -> dict[str, list[int]] | None:
        return self.nodes

    def drain(self, indices: set[int]) -> None:
        self.drained = indices

    def event(self, event: str, part: str, **detail: object) -> None:
        self.announced.append(part)

    async def write(self, *, is_early: bool) -> None:
        assert is_early and self.num_begun == self.num_written + self.num_cancelled, "one at a time"
        self.num_begun += 1
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            await asyncio.sleep(1)  # as one that has to tidy up
            self.num_cancelled += 1
            raise
        self.num_written += 1
        if self.error is not None:
            raise self.error


def on_virtual_clock(work: Coroutine[Any, Any, None]) -> None:
    loop = VirtualLoop()
    try:
        loop.run_until_complete(asyncio.wait_for(work, 1000))
    finally:
        loop.close()


async def cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def second_notice_during_a_checkpoint() -> None:
    parts = Parts()
    task = asyncio.ensure_future(parts.monitor.loop())
    parts.nodes = {"n1": [1]}
    await asyncio.sleep(10)
    assert (parts.drained, parts.num_begun, parts.num_written) == ({1}, 1, 0)
    parts.nodes = {"n1": [1], "n2": [2]}
    await asyncio.sleep(10)
    assert (parts.drained, parts.num_begun, parts.num_written) == ({1, 2}, 1, 0)
    assert parts.announced == ["node n1", "node n2"]
    await asyncio.sleep(300)
    assert parts.num_written == 2, "steps may have been made between the first checkpoint and the second notice"
    await cancelled(task)


def test_notices_are_seen_while_a_checkpoint_is_written() -> None:
    on_virtual_clock(second_notice_during_a_checkpoint())


async def no_answer_for_a_moment() -> None:
    parts = Parts()
    task = asyncio.ensure_future(parts.monitor.loop())
    parts.nodes = {"n1": [1]}
    await asyncio.sleep(100)
    parts.nodes = None
    await asyncio.sleep(10)
    assert parts.drained == {1}
    parts.nodes = {"n1": [1]}
    await asyncio.sleep(100)
    assert parts.announced == ["node n1"] and parts.num_written == 1
    parts.nodes = {}
    await asyncio.sleep(10)
    assert parts.drained == set()
    await cancelled(task)


def test_while_the_head_node_does_not_answer_a_drain_stands() -> None:
    on_virtual_clock(no_answer_for_a_moment())


async def failing_checkpoint() -> None:
    parts = Parts()
    parts.nodes, parts.error = {"n1": [1]}, OSError("read-only file system")
    with pytest.raises(OSError, match="read-only"):
        await parts.monitor.loop()
    assert parts.num_written == 1


def test_an_error_of_the_checkpoint_ends_the_loop() -> None:
    on_virtual_clock(failing_checkpoint())


async def lost_learner() -> None:
    parts = Parts()
    parts.nodes, parts.error = {"n1": [1]}, LearnerLost("its node is gone")
    task = asyncio.ensure_future(parts.monitor.loop())
    await asyncio.sleep(100)
    parts.nodes, parts.error = {"n2": [2]}, None
    await asyncio.sleep(100)
    assert not task.done() and parts.num_written == 2
    await cancelled(task)


def test_a_learner_that_is_lost_meanwhile_does_not_end_the_loop() -> None:
    on_virtual_clock(lost_learner())


async def end_during_a_checkpoint() -> None:
    parts = Parts()
    parts.nodes = {"n1": [1]}
    task = asyncio.ensure_future(parts.monitor.loop())
    await asyncio.sleep(10)
    await cancelled(task)
    assert (parts.num_begun, parts.num_cancelled) == (1, 1)


def test_the_end_of_the_loop_waits_for_the_end_of_the_write() -> None:
    on_virtual_clock(end_during_a_checkpoint())
