"""Verifier actors as the controller uses them: scores by reference, replaced when they die or do not answer."""

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray

from quatro_ray.actors.verifier import VerifierActor
from quatro_ray.actors.verifier_pool import VerifierPool
from quatro_ray.config import VerifierConfig
from quatro_ray.failures import VerifierFailed
from quatro_ray.types import DropReason, GroupSummary, Query, RolloutGroup
from tests.make import group, rollout
from tests.unit.rewards.test_workers import AWKWARD, reward_configs


def texts(*values: str) -> RolloutGroup:
    return group(1, *(replace(rollout(reward=None), text=v) for v in values))


def with_pool(rewards: Any, work: Any, **over: Any) -> Any:
    config = VerifierConfig(**({"num_workers": 2, "deadline_s": 3} | over))

    async def run() -> Any:
        made = VerifierActor.options(num_cpus=0, max_concurrency=100)  # type: ignore[attr-defined]  # Ray adds it
        pool = VerifierPool(lambda: made.remote(rewards, config, {}), config)
        try:
            return await asyncio.wait_for(work(pool), 120)
        finally:
            for actor in pool.actors:
                ray.kill(actor)

    return asyncio.run(run())


@pytest.fixture
def awkward(tmp_path: Path) -> Any:
    (tmp_path / "awkward.py").write_text(AWKWARD)
    return reward_configs(mine={"kind": "python", "function": f"{tmp_path / 'awkward.py'}:obey"})


def test_groups_are_scored_by_reference(local_ray: None) -> None:
    async def work(pool: VerifierPool) -> tuple[GroupSummary, RolloutGroup]:
        summary, scored = await pool.score(ray.put(texts("2", " 2 ", "3", "2x")))
        return summary, await scored

    summary, scored = with_pool(reward_configs(answer={"kind": "integer"}), work)
    assert scored.query == Query("q1", "1+1=", "2", {"level": "easy"})
    assert scored.rewards().tolist() == list(summary.rewards) == [1, 1, 0, 0]
    assert summary.answers == ("2", "2", "3", "2x")
    assert summary.correct == (True, True, False, False)
    assert summary.reward_values[0] == {"answer": 1.0}


def test_a_hanging_answer_is_exhausted_and_the_others_are_scored(local_ray: None, awkward: Any) -> None:
    async def work(pool: VerifierPool) -> Any:
        groups = [texts("ok", "hang", "ok"), *(texts("ok", "ok") for _ in range(4))]
        results = await asyncio.gather(*(pool.score(ray.put(g)) for g in groups))
        return [r[0] for r in results], pool.num_replaced

    (first, *others), replaced = with_pool(awkward, work, exhausted_reward=-1.0)
    assert first.rewards == (1.0, -1.0, 1.0)
    assert first.outcomes == {"ok": 2, "exhausted": 1, "unreadable": 0, "timeout": 0, "error": 0}
    assert all(o.rewards == (1.0, 1.0) for o in others)
    assert replaced == 0  # the actor lives on; its process was replaced


def test_a_reward_that_fails_is_no_reward(local_ray: None, awkward: Any) -> None:
    async def work(pool: VerifierPool) -> Any:
        with pytest.raises(VerifierFailed, match="cannot score") as caught:
            await pool.score(ray.put(texts("ok", "raise")))
        assert caught.value.reason is DropReason.VERIFIER_ERROR
        return (await pool.score(ray.put(texts("ok"))))[0].rewards, pool.num_replaced

    assert with_pool(awkward, work) == ((1.0,), 0)


def test_an_actor_that_dies_is_replaced_and_its_groups_are_scored(local_ray: None, awkward: Any) -> None:
    async def work(pool: VerifierPool) -> Any:
        await pool.score(ray.put(texts("ok")))
        waiting = [asyncio.create_task(pool.score(ray.put(texts("hang", "ok")))) for _ in range(3)]
        await asyncio.sleep(0.5)
        ray.kill(pool.actors[0])
        return [(await w)[0] for w in waiting], pool.num_replaced

    results, replaced = with_pool(awkward, work)
    assert [r.rewards for r in results] == [(0.0, 1.0)] * 3
    assert replaced == 1


def test_an_actor_that_does_not_answer_is_replaced(local_ray: None, awkward: Any) -> None:
    async def work(pool: VerifierPool) -> Any:
        with pytest.raises(VerifierFailed) as caught:
            await pool.score(ray.put(texts("hang")))
        assert caught.value.reason is DropReason.VERIFIER_TIMEOUT
        return (await pool.score(ray.put(texts("ok"))))[0].rewards, pool.num_replaced

    assert with_pool(awkward, work, deadline_s=60, group_deadline_s=2) == ((1.0,), 2)


def test_an_actor_that_never_starts_is_not_the_answers_fault(local_ray: None) -> None:
    async def run() -> None:
        config = VerifierConfig(start_deadline_s=1)
        made = VerifierActor.options(num_cpus=10_000)  # type: ignore[attr-defined]  # Ray adds it
        pool = VerifierPool(lambda: made.remote(reward_configs(a={"kind": "exact"}), config, {}), config)
        with pytest.raises(VerifierFailed) as caught:
            await pool.score(ray.put(texts("ok")))
        assert caught.value.reason is DropReason.VERIFIER_TIMEOUT
        for actor in pool.actors:
            ray.kill(actor)

    asyncio.run(asyncio.wait_for(run(), 60))
