"""Engines sleep while the learner trains, with requests under way, and whatever happens to one of them."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.unit.world import FakeLearner, World, audit, lose_an_engine


class OnlyLearner(FakeLearner):
    """Trains only if no engine uses a device."""

    async def train_step(self, leased: Any, version: int) -> dict[str, Any]:
        self._all_asleep()
        metrics = await super().train_step(leased, version)
        self._all_asleep()
        return metrics

    def _all_asleep(self) -> None:
        alive = [g for g in self.world.generators if g.died is None and g.has_started]
        assert alive and not any(g.awake.is_set() for g in alive)


def alternating(path: Path) -> World:
    world = World(path, cluster={"colocate": True, "colocate_mode": "alternating"})
    world.learner = OnlyLearner(world)
    return world


def test_requests_under_way_survive_the_learners_turn(tmp_path: Path) -> None:
    world = alternating(tmp_path / "r")
    counters = world.run()
    audit(world)
    assert counters.steps.in_flight_updates > 0 and not world.events("lost")


def test_an_engine_that_is_lost_does_not_start_in_the_learners_turn(tmp_path: Path) -> None:
    world = alternating(tmp_path / "r")
    world.faults = lose_an_engine
    world.run()
    audit(world)
    assert len(world.events("recovered")) == 1


@pytest.mark.parametrize("call", ["sleep", "wake_up"])
def test_an_engine_that_hangs_is_lost_and_the_run_continues(tmp_path: Path, call: str) -> None:
    async def hang(world: World) -> None:
        while world.controller.step < 3:
            await asyncio.sleep(0.01)
        world.generators[0].hangs_in = call

    world = alternating(tmp_path / "r")
    world.faults = hang
    world.run()
    audit(world)
    (lost,) = world.events("lost")
    assert f"{call} missed generator.sleep_deadline_s=60 s" in lost["why"]


def test_a_learner_that_dies_in_its_turn_leaves_the_engines_awake(tmp_path: Path) -> None:
    async def die(world: World) -> None:
        while world.controller.step < 3 or world.generators[0].awake.is_set():
            await asyncio.sleep(0.01)
        world.learner.lost = "a rank died"

    world = alternating(tmp_path / "r")
    world.faults = die
    world.run()
    audit(world)
    assert [event["part"] for event in world.events("lost")] == ["learner"]
