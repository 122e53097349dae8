"""What dies comes back and nothing is lost: random schedules of faults on a virtual clock, and the cases by hand."""

from __future__ import annotations

import asyncio
import os
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from quatro_ray.config import dump_config
from quatro_ray.errors import ClusterError, Preempted
from quatro_ray.jobs.audit import audit_run
from quatro_ray.types import DropReason
from tests.unit.fake_generator import FakeGenerator
from tests.unit.faults import FAULTS, between_steps, inflict, make_world, run_to_the_end, schedule
from tests.unit.world import FakeEvaluator, World, audit, read

NUM_SCHEDULES = int(os.environ.get("QUATRO_NUM_SCHEDULES", "150"))


@settings(max_examples=NUM_SCHEDULES, deadline=None, derandomize=True)
@example(  # both engines hang while they start
    faults=[(0.5, "engine dies", 0), (1.0, "engine hangs", 0), (1.0, "engine hangs", 1)],
    eta=2, repeat_every=0, evaluate_s=0.3, generates_during_transfer=False, seed=0,
)  # fmt: skip
@given(
    faults=st.lists(st.tuples(st.floats(0.05, 15), st.sampled_from(FAULTS), st.integers(0, 1)), max_size=6),
    eta=st.sampled_from([0, 2]),
    repeat_every=st.sampled_from([0, 3]),
    evaluate_s=st.sampled_from([None, 0.3, 5.0]),
    generates_during_transfer=st.booleans(),
    seed=st.integers(0, 5),
)
def test_no_schedule_of_faults_loses_or_repeats_a_group(
    tmp_path_factory: pytest.TempPathFactory,
    faults: Any,
    eta: int,
    repeat_every: int,
    evaluate_s: float | None,
    generates_during_transfer: bool,
    seed: int,
) -> None:
    """`evaluate_s`: how long engines of their own take; None: the generators evaluate."""
    path = tmp_path_factory.mktemp("r")
    world = make_world(path, replay={"max_staleness": eta}, evaluation={"every_steps": 3})
    world.evaluator = None if evaluate_s is None else FakeEvaluator(world.learner, evaluate_s)
    world.rng, world.repeat_every = random.Random(seed), repeat_every
    world.generates_during_transfer = generates_during_transfer
    world.faults = schedule(faults)
    (path / "config.yaml").write_text(dump_config(world.config))
    run_to_the_end(world)
    audit(world)
    assert audit_run(path).findings.keys() <= {"checkpoints"}  # whose bits were flipped, and which nothing needed since
    # nothing was given up on the way but, of an asynchronous run, groups that came too late
    reasons = {reason for reason, n in world.buffer.stats().drops.items() if n}
    assert reasons <= ({"run_ended", "stale"} if eta else {"run_ended"})
    assert world.learner.weights == 12
    assert world.controller.counters.steps.trained_tokens <= world.controller.counters.generated_tokens
    evaluated = read(world.config.run.dir / "evaluations.jsonl")
    assert [e["step"] for e in evaluated] == [0, 3, 6, 9, 12] == [e.step for e in world.controller.counters.evaluations]


def test_an_engine_that_dies_is_replaced_and_its_groups_go_elsewhere(tmp_path: Path) -> None:
    world = make_world(tmp_path / "r", replay={"max_staleness": 0}, run={"num_steps": 30})
    world.faults = between_steps("engine dies")
    tally = world.run()
    audit(world)
    assert world.fleet.num_lost == 1 and len(world.generators) == 3
    assert tally.groups_requeued > 0
    (lost,), (back,) = world.events("lost"), world.events("recovered")
    assert (lost["part"], lost["why"]) == ("generator 0", "its process was killed")
    assert back["part"] == "generator 0"
    assert len(world.generators[2].seeds) > 0  # it was given work, after an update
    assert world.generators[2].version > 0


def test_groups_that_an_engine_had_begun_are_continued_by_another(tmp_path: Path) -> None:
    """All of them: the actor is not killed before each has told how far it came."""
    world = make_world(tmp_path / "r", run={"num_steps": 30})
    begun: list[int] = []

    async def faults(world: World) -> None:
        while world.controller.step < 3 or world.generators[0].running < 2:
            await asyncio.sleep(0.01)
        engine = world.generators[0]
        begun.append(engine.running)
        engine.tells, engine.died = True, "its core was killed"

    world.faults = faults
    tally = world.run()
    audit(world)
    continued = [group_id for engine in world.generators for group_id in engine.continued]
    assert tally.groups_continued == len(continued) == len(set(continued)) == begun[0]
    assert tally.groups_requeued == begun[0]


def test_the_only_engine_comes_back_while_the_learner_waits(tmp_path: Path) -> None:
    world = make_world(tmp_path / "r")
    world.config = world.config.model_copy(
        update={"generator": world.config.generator.model_copy(update={"num_engines": 1})}
    )
    world.faults = between_steps("engine hangs")
    world.run()
    audit(world)
    assert world.fleet.num_lost == 1


def test_a_hung_engine_is_noticed_by_its_silence(tmp_path: Path) -> None:
    world = make_world(tmp_path / "r")
    world.faults = between_steps("engine hangs", 1)
    world.run()
    assert any(
        "gave no sign of life for 10 s" in e["why"] or "missed its deadline" in e["why"] for e in world.events("lost")
    )


def test_an_engine_that_samples_nothing_is_hung_though_it_answers(tmp_path: Path) -> None:
    class Stuck(FakeGenerator):
        async def generate(self, group_id: int, *args: Any) -> Any:
            if group_id > 3:
                self.running += 1
                await self._ended.wait()
            return await super().generate(group_id, *args)

    world = make_world(tmp_path / "r")
    made: list[FakeGenerator] = []

    def make(index: int) -> FakeGenerator:
        made.append(Stuck(world.rng) if len(made) == 0 else FakeGenerator(world.rng))
        return made[-1]

    world.make_generator = make
    world.run()
    audit(world)
    assert "sampled no token for 20 s" in world.events("lost")[0]["why"]


def test_a_query_that_kills_engines_is_quarantined(tmp_path: Path) -> None:
    class Victim(FakeGenerator):
        async def generate(self, group_id: int, *args: Any) -> Any:
            if group_id == 7:
                self.died = "out of memory"
            return await super().generate(group_id, *args)

    world = make_world(tmp_path / "r")
    generator = world.config.generator.model_copy(update={"max_engines_lost": 2, "max_groups_in_flight": 1})
    world.config = world.config.model_copy(update={"generator": generator})
    world.make_generator = lambda index: Victim(world.rng)
    world.run()
    audit(world)
    assert world.buffer.ledger.drops()[DropReason.QUARANTINED] == 1
    assert world.fleet.num_lost == 3
    assert "group 7: quarantined: 3 engines died while generating it" in (tmp_path / "r" / "notes.log").read_text()


def test_engines_that_never_start_end_the_run(tmp_path: Path) -> None:
    class Doomed(FakeGenerator):
        async def start(self) -> None:
            raise RuntimeError("no such device")

    world = make_world(tmp_path / "r")
    world.config = world.config.model_copy(
        update={"generator": world.config.generator.model_copy(update={"max_restarts": 3})}
    )
    made: list[FakeGenerator] = []

    def make(index: int) -> FakeGenerator:
        made.append(FakeGenerator(world.rng) if len(made) < 2 else Doomed(world.rng))
        return made[-1]

    world.make_generator = make
    world.faults = schedule([(1.0, "engine dies", 0), (0.1, "engine dies", 1)])
    with pytest.raises(ClusterError, match=r"lost 4 times in a row, the last time: did not start: no such device"):
        world.run()


def test_a_learner_that_dies_falls_back_and_trains_the_same_groups_again(tmp_path: Path) -> None:
    world = make_world(tmp_path / "r", replay={"max_staleness": 0})

    async def faults(world: World) -> None:
        while world.controller.step < 7:
            await asyncio.sleep(0.05)
        world.learner.lost = "a rank was killed"

    world.faults = faults
    tally = world.run()
    audit(world)
    (back,) = world.events("fell_back")
    assert (back["step"], back["checkpoint"]) == (4, "step_4")
    assert tally.steps_lost == 3 and tally.learner_restarts == 1
    # synchronous: the steps that were lost are made again from the same groups, in the same order
    assert sorted(set(world.learner.leased)) == list(range(1, 49)) and len(world.learner.leased) == 48 + 12
    assert world.learner.leased[28:40] == world.learner.leased[16:28]


@pytest.mark.parametrize("step", [0, 5])
def test_a_learner_that_never_comes_further_ends_the_run(tmp_path: Path, step: int) -> None:
    """Also where it makes steps again that it had made before it died."""
    world = make_world(tmp_path / "r")
    world.config = world.config.model_copy(
        update={"learner": world.config.learner.model_copy(update={"max_restarts": 2})}
    )

    async def faults(world: World) -> None:
        while True:
            await asyncio.sleep(0.1)
            if world.learner.weights > step:
                world.learner.lost = "illegal memory access"

    world.faults = faults
    with pytest.raises(ClusterError, match=rf"lost 3 times and did not get past step {step}.*illegal memory access"):
        world.run()


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path: Path) -> None:
    world = make_world(tmp_path / "r")

    async def faults(world: World) -> None:
        while not (world.config.run.dir / "checkpoints" / "step_8").is_dir():
            await asyncio.sleep(0.05)
        inflict(world, "bit flips", 0)

    world.faults = faults
    world.run()
    audit(world)
    (damaged,), (back,) = world.events("damaged"), world.events("fell_back")
    assert "step_8: weights has 2 bytes instead of 1; it is now step_8.damaged" in damaged["why"]
    assert back["checkpoint"] == "step_4"


def test_a_run_that_is_told_to_end_leaves_a_checkpoint_and_goes_on(tmp_path: Path) -> None:
    world = make_world(tmp_path / "r")
    world.faults = schedule([(2.0, "stop", 0)])
    with pytest.raises(Preempted, match=r"told to stop after step \d+ of 12; a checkpoint is written"):
        world.run()
    step = len(world.metrics())
    assert (world.config.run.dir / "checkpoints" / f"step_{step}").is_dir()
    world.faults = None
    tally = world.run(resume=True)
    audit(world)
    assert tally.resumed == 1 and tally.steps_lost == 0 and tally.steps.learner_steps == 12
    assert [e["step"] for e in read(tmp_path / "r" / "evaluations.jsonl")] == [0, 12]


def test_no_checkpoint_within_the_grace_time_ends_all_the_same(tmp_path: Path) -> None:
    world = make_world(tmp_path / "r")

    async def slow(folder: Path, deadline_s: float) -> Any:
        await asyncio.sleep(1000)

    world.learner.save_checkpoint = slow  # type: ignore[method-assign]
    world.faults = schedule([(2.0, "stop", 0)])
    with pytest.raises(Preempted, match=r"no checkpoint finished within checkpoint\.grace_s=25 s"):
        world.run()


def test_a_controller_that_is_killed_before_any_checkpoint_starts_over_and_loses_no_group(tmp_path: Path) -> None:
    world = make_world(tmp_path / "r")
    world.faults = schedule([(1.5, "controller dies", 0)])
    assert run_to_the_end(world) == 1
    audit(world)
    assert world.learner.exported == [4, 8, 12]
    assert [e["step"] for e in read(tmp_path / "r" / "evaluations.jsonl")] == [0, 12]


def test_a_learner_that_dies_in_the_last_export_exports_again(tmp_path: Path) -> None:
    world = make_world(tmp_path / "r")

    async def faults(world: World) -> None:
        while not (world.config.run.dir / "checkpoints" / "step_12").is_dir():
            await asyncio.sleep(0.01)
        world.learner.lost = "a rank was killed"

    world.faults = faults
    tally = world.run()
    audit(world)
    assert tally.learner_restarts == 1 and tally.steps_lost == 0
    assert world.learner.exported == [4, 8, 12]
    assert [e["step"] for e in read(tmp_path / "r" / "evaluations.jsonl")] == [0, 12]


def test_a_controller_that_is_killed_after_the_last_checkpoint_exports_when_it_goes_on(tmp_path: Path) -> None:
    world = make_world(tmp_path / "r")

    async def faults(world: World) -> None:
        while not (world.config.run.dir / "checkpoints" / "step_12").is_dir():
            await asyncio.sleep(0.01)
        world.faults = None
        inflict(world, "controller dies", 0)

    world.faults = faults
    assert run_to_the_end(world) == 1
    audit(world)
    assert world.learner.exported == [4, 8, 12]
    assert [e["step"] for e in read(tmp_path / "r" / "evaluations.jsonl")] == [0, 12]


def test_a_fleet_that_is_closed_replaces_nobody(tmp_path: Path) -> None:
    world = make_world(tmp_path / "r")
    world.run()
    made = len(world.generators)
    world.fleet._watcher = None  # its files are closed
    world.fleet.lost(member := world.fleet.slots[0], "its weights are in doubt")
    assert isinstance(member.client, FakeGenerator) and member.client.died == "it was killed"
    assert len(world.generators) == made
