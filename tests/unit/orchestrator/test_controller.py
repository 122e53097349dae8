"""The loops, on fakes with the interfaces of actors/generator_client.py, over the real replay buffer."""

import asyncio
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import RayTaskError

from quatro_ray.errors import ClusterError, StallError, WeightSyncError
from quatro_ray.failures import TransferFailed
from quatro_ray.telemetry.evaluation_result import EvaluationResult
from tests.unit.fake_generator import FakeGenerator
from tests.unit.world import FakeEvaluator, World, lose_an_engine


@pytest.mark.parametrize("eta", [0, 1, 4])
def test_a_run_accounts_for_every_group_and_keeps_the_cap(tmp_path: Path, eta: int) -> None:
    world = World(tmp_path / "r", replay={"max_staleness": eta})
    tally = world.run()
    counts = world.buffer.stats().groups
    assert sum(counts.values()) == world.buffer.stats().num_admitted
    assert counts["trained"] == 12 * 4 == len(set(world.learner.leased))
    assert counts["trained"] + counts["dropped"] == world.buffer.stats().num_admitted
    assert max(tally.steps.staleness_tokens) <= eta
    assert (max(tally.steps.staleness_tokens) > 0) == (eta > 0)
    assert tally.steps.learner_steps == tally.steps.weight_updates == 12
    assert len(tally.evaluations) == 2
    lines = (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 13))


def test_synchronous_mode_takes_groups_in_order(tmp_path: Path) -> None:
    world = World(tmp_path / "r", replay={"max_staleness": 0})
    tally = world.run()
    assert world.learner.leased == list(range(1, 49))
    assert tally.steps.in_flight_updates == tally.multi_version_rollouts == 0


def test_a_transient_failure_loses_nothing(tmp_path: Path) -> None:
    class Flaky(FakeGenerator):
        calls = 0

        async def generate(self, *args: Any) -> Any:
            self.calls += 1
            self.failures = int(self.calls % 7 == 0)
            return await super().generate(*args)

    world = World(tmp_path / "r", generator={"max_retries": 5})
    world.make_generator = lambda index: Flaky(random.Random(index))
    world.run()
    assert world.buffer.stats().drops["generator_error"] == 0
    assert world.buffer.stats().groups["trained"] == 48 == world.buffer.stats().num_admitted
    assert "again after generator_error: out of memory" in (tmp_path / "r" / "notes.log").read_text()


def test_groups_that_keep_failing_are_dropped_and_end_the_run(tmp_path: Path) -> None:
    class Broken(FakeGenerator):
        async def generate(self, group_id: int, *args: Any) -> Any:
            if group_id >= 0:  # evaluation works
                raise RayTaskError("generate", "out of memory", ValueError("out of memory"))
            return await super().generate(group_id, *args)

    world = World(tmp_path / "r")
    world.make_generator = lambda index: Broken(random.Random(index))
    with pytest.raises(StallError, match="16 groups in a row were dropped, the last one for generator_error"):
        world.run()
    assert world.buffer.stats().drops["generator_error"] >= 15


def test_an_evaluation_that_cannot_be_complete_ends_the_run(tmp_path: Path) -> None:
    world = World(tmp_path / "r")
    world.make_generator = lambda index: FakeGenerator(random.Random(index), failures=1000)
    with pytest.raises(ClusterError, match="evaluation: question 'h"):
        world.run()


def test_lost_verifications_are_dropped_with_their_reason_and_replaced(tmp_path: Path) -> None:
    world = World(tmp_path / "r")
    world.run(failing={3, 11})
    stats = world.buffer.stats()
    assert stats.drops["verifier_timeout"] == 2
    assert stats.groups["trained"] == 48
    assert world.buffer.stats().num_admitted == 50
    assert "group 3: verifier_timeout: lost" in (tmp_path / "r" / "notes.log").read_text()


def test_filtered_groups_are_dropped_with_their_reason_and_replaced(tmp_path: Path) -> None:
    world = World(tmp_path / "r", filters={"max_truncated_share": 0.5})
    world.verifiers.truncated = {2, 5, 6}
    world.run()
    stats = world.buffer.stats()
    assert stats.drops["overlong"] == 3
    assert stats.groups["trained"] == 48
    assert world.buffer.stats().num_admitted == 51
    metrics = world.metrics()
    assert sum(m.get("drops/overlong", 0) for m in metrics) == 3
    assert {m["drops/overlong_response_tokens_mean"] for m in metrics if "drops/overlong" in m} == {3.0}
    assert {m["drops/overlong_pass_rate"] for m in metrics if "drops/overlong" in m} == {1.0}


def test_every_step_has_the_figures_of_the_groups_that_it_trained(tmp_path: Path) -> None:
    """Here the engines are ahead of the learner, so that many steps begin without a newly scored group."""
    world = World(tmp_path / "r", replay={"max_staleness": 4})
    world.verifiers.truncated = set(range(1, 1000))
    world.run()
    for m in world.metrics():
        assert m["rollout/truncated_share"] == m["reward/part_answer"] == m["reward/mean"] == m["pass_rate/mean"] == 1.0
        assert m["reward/source_set"] == m["pass_rate/source_set"] == 1.0
        assert m["rollout/turns"] == 1.0
        assert (m["rollout/num"], m["groups/source_set"]) == (16, 4)
        assert m["rollout/response_tokens_histogram"] == {"3": 16}
        assert m["throughput/trained_tokens_per_s"] == pytest.approx(m["tokens/trained"] / m["time/step_s"])


def test_the_time_of_every_role_adds_up_in_every_step(tmp_path: Path) -> None:
    world = World(tmp_path / "r", generator={"num_engines": 3}, evaluation={"every_steps": 4})
    world.faults = lose_an_engine
    world.run()
    found: dict[str, set[str]] = {}
    for m in world.metrics():
        spent: dict[str, float] = {}
        for key, share in m.items():
            if key.startswith("time_share/"):
                _, role, state = key.split("/")
                found.setdefault(role, set()).add(state)
                spent[role] = spent.get(role, 0.0) + share
        assert spent["learner"] == pytest.approx(1) == spent["generators"]
    assert found["learner"] >= {"train", "sync", "evaluate"}
    assert found["generators"] >= {"busy", "start", "paused", "evaluate"}


def test_steps_that_learn_nothing_are_counted_and_told(tmp_path: Path) -> None:
    world = World(tmp_path / "r")
    world.learner.uninformative = True
    counters = world.run()
    assert counters.steps.uninformative_steps == 12
    told = [line for line in (tmp_path / "r" / "notes.log").read_text().splitlines() if "warning" in line]
    assert len(told) == 1 and "step 10: warning: for 10 steps, no step was taken" in told[0]


def test_filters_that_let_nothing_pass_end_the_run(tmp_path: Path) -> None:
    world = World(tmp_path / "r", filters={"drop_zero_variance": True, "max_in_a_row": 10})
    with pytest.raises(StallError, match=r"max_in_a_row=10 groups in a row were filtered out"):
        world.run()


def test_nothing_but_drops_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(StallError, match="16 groups in a row were dropped, the last one for verifier_timeout"):
        World(tmp_path / "r").run(failing=set(range(1, 1000)))


def test_a_stall_says_who_was_doing_what(tmp_path: Path) -> None:
    world = World(tmp_path / "r", cluster={"stall_deadline_s": 0.2})

    class Hung(FakeGenerator):
        async def generate(self, group_id: int, *args: Any) -> Any:
            if group_id >= 0:
                self.running += 1
                await asyncio.sleep(3600)
            return await super().generate(group_id, *args)

    world.make_generator = lambda index: Hung(random.Random(index))
    with pytest.raises(StallError, match=r"no group became ready for 0.2 s.*'pending': 12.*num_running=4"):
        world.run()
    text = (tmp_path / "r" / "stall.txt").read_text()
    assert "generator 1 (healthy): stacks\ngenerating" in text and "learner rank 0: stacks\nlearning" in text


def test_updates_that_always_fail_end_the_run(tmp_path: Path) -> None:
    world = World(tmp_path / "r")
    world.send_error = TransferFailed("no route")
    with pytest.raises(WeightSyncError, match="no engine took version 1 in 5 tries; the last failure: no route"):
        world.run()


def test_checkpoints_and_evaluations_come_when_due(tmp_path: Path) -> None:
    world = World(
        tmp_path / "r",
        checkpoint={"every_steps": 5},
        evaluation={"every_steps": 6, "num_queries": 4, "samples_per_query": 8, "rollout_groups": 0},
    )
    tally = world.run()
    assert world.learner.saved == ["step_5", "step_10", "step_12"]
    assert [e.version for e in tally.evaluations] == [0, 6, 12]


def test_seeds_depend_on_run_and_group_alone(tmp_path: Path) -> None:
    first, second = (
        World(tmp_path / f"r{n}", replay={"max_staleness": 0}, generator={"num_engines": n}) for n in (2, 1)
    )
    first.run()
    second.run()
    assert Counter(s for g in first.generators for s in g.seeds) == Counter(second.generators[0].seeds)


def test_training_goes_on_while_engines_of_their_own_evaluate(tmp_path: Path) -> None:
    world = World(tmp_path / "r", evaluation={"every_steps": 4, "num_engines": 1})
    world.evaluator = FakeEvaluator(world.learner, seconds=1.5)
    tally = world.run()
    seen = world.evaluator.seen
    assert [version for version, *_ in seen] == [0, 4, 8, 12] == [e.version for e in tally.evaluations]
    assert any(done > begun for *_, begun, done in seen)
    # one waits at most while another is evaluated, so that training is never far ahead
    assert all(begun - step <= 2 * 4 for _, step, begun, _ in seen)
    assert not [p for p in (tmp_path / "r" / "evaluating").iterdir() if p.is_dir()]
    lines = [json.loads(x) for x in (tmp_path / "r" / "evaluations.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 4, 8, 12]


def test_an_evaluation_that_fails_ends_the_run(tmp_path: Path) -> None:
    class Broken(FakeEvaluator):
        async def evaluate(self, *args: Any) -> list[EvaluationResult]:
            raise ClusterError("an evaluation engine failed: out of memory")

    world = World(tmp_path / "r", evaluation={"num_engines": 1})
    world.evaluator = Broken(world.learner, seconds=1.5)
    with pytest.raises(ClusterError, match="an evaluation engine failed"):
        world.run()
