"""Promises of docs/recovery.md about engines that are given up, the last export, damaged checkpoints and the ledger."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from quatro_ray.engines.checkpoint_store import LEDGER, check_room
from quatro_ray.errors import CheckpointError, ClusterError, Preempted
from quatro_ray.orchestrator import checkpoint_writer
from quatro_ray.types import GroupState
from tests.unit.fake_generator import FakeGenerator
from tests.unit.faults import make_world, schedule
from tests.unit.world import World, audit


class Doomed(FakeGenerator):
    async def start(self) -> None:
        raise RuntimeError("no such device")


def world_with_a_lost_engine(path: Path, *, min_engines: int) -> World:
    """Engine 0 dies, and none that takes its place starts."""
    world = make_world(path)
    limits = {"max_restarts": 1, "min_engines": min_engines}
    world.config = world.config.model_copy(
        update={"generator": world.config.generator.model_copy(update=limits)}, deep=True
    )
    world.make_generator = lambda index: (Doomed if index == 0 and len(world.generators) > 1 else FakeGenerator)(
        world.rng
    )
    world.faults = schedule([(1.0, "engine dies", 0)])
    return world


def test_the_run_goes_on_while_enough_engines_are_left(tmp_path: Path) -> None:
    world = world_with_a_lost_engine(tmp_path / "r", min_engines=1)
    world.run()
    audit(world)
    (given_up,) = world.events("given_up")
    assert given_up["part"] == "generator 0"
    assert world.given_back == [0]


def test_the_run_ends_when_fewer_engines_are_left(tmp_path: Path) -> None:
    world = world_with_a_lost_engine(tmp_path / "r", min_engines=2)
    with pytest.raises(ClusterError, match="no such device"):
        world.run()


def test_the_last_export_waits_for_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = make_world(tmp_path / "r")
    check, refused = check_room, list[str]()

    def full_for_a_while(folder: Path, num_bytes: int, what: str, remedy: str) -> None:
        if (tmp_path / "r" / "checkpoints" / "step_12").is_dir() and len(refused) < 3:
            refused.append(what)
            raise CheckpointError(f"{folder}: 0 bytes are free")
        check(folder, num_bytes, what, remedy)

    monkeypatch.setattr(checkpoint_writer, "check_room", full_for_a_while)
    world.run()
    audit(world)
    assert refused == ["an export"] * 3
    assert [(e["part"], e["step"]) for e in world.events("failed")] == [("export", 12)] * 3
    assert world.learner.exported[-1] == 12


def stopped(path: Path) -> World:
    """A run that was told to end, after some checkpoints."""
    world = make_world(path, run={"num_steps": 30})
    world.faults = schedule([(4.0, "stop", 0)])
    with pytest.raises(Preempted):
        world.run()
    world.faults = None
    return world


def test_when_all_checkpoints_are_damaged_the_run_does_not_begin_anew_unasked(tmp_path: Path) -> None:
    world = stopped(tmp_path / "r")
    folder = tmp_path / "r" / "checkpoints"
    for _ in range(2):
        for weights in folder.glob("step_*/weights"):
            weights.write_text(weights.read_text() + "1")
        with pytest.raises(
            CheckpointError, match=r"no checkpoint is left but damaged ones .* or begin again from step 0"
        ):
            world.run(resume=True)
    for path in folder.iterdir():
        shutil.rmtree(path)
    assert world.run(resume=True).steps.learner_steps == 30
    audit(world)


def test_a_run_goes_on_from_the_copy_of_the_ledger_in_its_checkpoint(tmp_path: Path) -> None:
    """Groups that were admitted since the copy get the same numbers and queries again."""
    world = stopped(tmp_path / "r")
    newest = max((tmp_path / "r" / "checkpoints").glob("step_*"), key=lambda path: int(path.name[5:]))
    world.buffer.ledger.close()
    for suffix in ("-wal", "-shm"):
        Path(f"{world.ledger}{suffix}").unlink(missing_ok=True)
    shutil.copy(newest / LEDGER, world.ledger)
    tally = world.run(resume=True)
    audit(world)
    assert tally.steps.learner_steps == 30 and tally.steps_lost == 0
    assert world.buffer.ledger.counts()[GroupState.TRAINED] == 30 * world.config.replay.groups_per_step
