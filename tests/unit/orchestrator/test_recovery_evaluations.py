"""Evaluations when something dies: each due step is evaluated once in the records, and none costs what was trained."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from quatro_ray.errors import ClusterError, Preempted
from tests.unit.faults import kill_when, make_world, run_to_the_end, schedule
from tests.unit.world import FakeEvaluator, World, audit, read


def test_engines_and_learner_that_die_while_engines_evaluate_come_back(tmp_path: Path) -> None:
    """The engines wait for weights, which the learner cannot send: the evaluation must not wait for them."""
    world = make_world(tmp_path / "r", replay={"max_staleness": 0})
    world.faults = schedule([(0.25, "engine dies", 0), (0.25, "engine dies", 1), (1.0, "learner dies", 0)])
    world.run()
    audit(world)
    assert [e["step"] for e in read(tmp_path / "r" / "evaluations.jsonl")] == [0, 12]


@pytest.mark.parametrize(("first_s", "seen_steps"), [(0.1, [0, 6, 6, 12]), (12.0, [0, 6, 12])])
def test_what_was_evaluated_of_a_policy_that_is_abandoned_is_left_out(
    tmp_path: Path, first_s: float, seen_steps: list[int]
) -> None:
    """With engines of its own an evaluation may end after its step was given up, or not have begun by then."""
    world = make_world(tmp_path / "r", evaluation={"every_steps": 6})
    world.evaluator = FakeEvaluator(world.learner, seconds=first_s)

    async def faults(world: World) -> None:
        while world.controller.step < 5:
            await asyncio.sleep(0.01)
        world.evaluator.seconds = 12.0
        while world.controller.step < 7:
            await asyncio.sleep(0.01)
        world.learner.lost = "a rank was killed"  # step 6 is being evaluated, and the newest checkpoint is of step 4

    world.faults = faults
    world.run()
    audit(world)
    evaluated = read(tmp_path / "r" / "evaluations.jsonl")
    seen = [(version, step) for version, step, *_ in world.evaluator.seen]
    assert [step for _, step in seen] == seen_steps
    assert [(e["version"], e["step"]) for e in evaluated] == [seen[0], *seen[-2:]]


@pytest.mark.parametrize("killed_at", [5, 6, 8, 9, 12])
def test_evaluations_by_engines_of_their_own_survive_the_controller(tmp_path: Path, killed_at: int) -> None:
    """Each due step is evaluated once in the records, also where its evaluation was under way or waited."""
    world = make_world(tmp_path / "r", evaluation={"every_steps": 4})
    world.evaluator = FakeEvaluator(world.learner, seconds=2.0)
    world.faults = kill_when(lambda world: world.controller.step >= killed_at)
    assert run_to_the_end(world) == 1
    audit(world)
    evaluated = read(tmp_path / "r" / "evaluations.jsonl")
    assert [e["step"] for e in evaluated] == [0, 4, 8, 12]
    assert [(e.version, e.step) for e in world.controller.counters.evaluations] == [
        (e["version"], e["step"]) for e in evaluated
    ]
    assert not [p for p in (tmp_path / "r" / "evaluating").iterdir() if p.is_dir()]


def test_a_learner_that_dies_while_an_evaluation_is_waited_for_is_restarted_at_once(tmp_path: Path) -> None:
    world = make_world(tmp_path / "r", evaluation={"every_steps": 1})
    world.evaluator = FakeEvaluator(world.learner, seconds=500.0)

    async def faults(world: World) -> None:
        while len(world.controller.evaluation.pending()) < 2 or world.controller.step < 2:
            await asyncio.sleep(0.01)
        await asyncio.sleep(5)
        world.learner.lost = "a rank was killed"
        await asyncio.sleep(60)
        restarts.append(world.controller.counters.learner_restarts)

    restarts: list[int] = []
    world.faults = faults
    world.run()
    audit(world)
    assert restarts == [1]


def test_a_run_that_is_prolonged_keeps_what_was_evaluated(tmp_path: Path) -> None:
    """The last evaluations are done after the last checkpoint, which only has them as to come."""
    world = make_world(tmp_path / "r", evaluation={"every_steps": 5})
    world.evaluator = FakeEvaluator(world.learner, seconds=2.0)
    world.run()
    world.config = world.config.model_copy(update={"run": world.config.run.model_copy(update={"num_steps": 16})})
    tally = world.run(resume=True)
    audit(world)
    assert [e.step for e in tally.evaluations] == [0, 5, 10, 12, 15, 16]
    assert [e["step"] for e in read(tmp_path / "r" / "evaluations.jsonl")] == [0, 5, 10, 12, 15, 16]


@pytest.mark.parametrize("has_engines", [True, False])
def test_an_evaluation_that_fails_ends_the_run_and_loses_nothing(tmp_path: Path, has_engines: bool) -> None:
    world = make_world(tmp_path / "r", evaluation={"every_steps": 6})
    world.config = world.config.model_copy(
        update={"checkpoint": world.config.checkpoint.model_copy(update={"every_steps": None})}
    )
    if has_engines:
        world.evaluator = FakeEvaluator(world.learner, seconds=0.1)

    async def faults(world: World) -> None:
        while world.controller.step < 5:
            await asyncio.sleep(0.01)
        if has_engines:
            world.evaluator.fails = True
        else:
            world.verifiers.fails = True

    world.faults = faults
    with pytest.raises(ClusterError):
        world.run()
    (checkpoint,) = (tmp_path / "r" / "checkpoints").iterdir()
    assert checkpoint.name in {f"step_{n}" for n in range(6, 9)}
    world.faults = None
    world.verifiers.fails = False
    if has_engines:
        world.evaluator.fails = False
    tally = world.run(resume=True)
    audit(world)
    assert tally.steps_lost == 0
    assert [e["step"] for e in read(tmp_path / "r" / "evaluations.jsonl")] == [0, 6, 12]


def test_a_run_that_is_told_to_end_during_an_evaluation_leaves_a_checkpoint(tmp_path: Path) -> None:
    world = make_world(tmp_path / "r", evaluation={"every_steps": 1})
    world.evaluator = FakeEvaluator(world.learner, seconds=1000)
    world.faults = schedule([(10.0, "stop", 0)])
    with pytest.raises(Preempted, match=r"after step 2 of 12; a checkpoint is written"):
        world.run()
    world.evaluator.seconds, world.faults = 0.1, None
    world.run(resume=True)
    audit(world)
    assert [e["step"] for e in read(tmp_path / "r" / "evaluations.jsonl")] == list(range(13))
