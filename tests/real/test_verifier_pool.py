"""Deadlines and failures of verifiers, with real workers that really hang or die."""

import asyncio
import os
import time
from typing import Any

import pytest
import ray

from quatro_ray.actors.verifier import VerifierActor, summarise
from quatro_ray.actors.verifier_pool import VerifierFailed, VerifierPool
from quatro_ray.config import VerifierConfig
from quatro_ray.types import DropReason, Query, RolloutGroup, Score
from tests.make import group, rollout

pytestmark = pytest.mark.slow


@ray.remote
class Awkward:
    """Obeys its texts: hang, crash, or raise; else scores 1."""

    def _one(self, text: str) -> Score:
        if text == "hang":
            time.sleep(600)
        if text == "die":
            os._exit(1)
        if text == "raise":
            raise RuntimeError("cannot judge")
        return Score(1.0)

    @ray.method(num_returns=2)
    def score(self, group: RolloutGroup) -> Any:
        return summarise(group, [self._one(r.text) for r in group.rollouts])

    def score_rollout(self, group: RolloutGroup, index: int) -> Score:
        return self._one(group.rollouts[index].text)

    @ray.method(num_returns=2)
    def assemble(self, group: RolloutGroup, scores: list[Score]) -> Any:
        return summarise(group, scores)


def texts(*values: str) -> RolloutGroup:
    from dataclasses import replace

    return group(1, *(replace(rollout(reward=None), text=v) for v in values))


def make_pool(actor: Any, **over: Any) -> VerifierPool:
    return VerifierPool(lambda: actor.options(num_cpus=0).remote(), VerifierConfig(**({"deadline_s": 5} | over)))


def close(pool: VerifierPool) -> None:
    for worker in pool.workers:
        ray.kill(worker)


def test_a_hanging_answer_is_exhausted_and_the_others_are_scored(local_ray: None) -> None:
    async def run() -> tuple[Any, int]:
        pool = make_pool(Awkward, exhausted_reward=-1.0)
        hanging, fine = texts("ok", "hang", "ok"), texts("ok", "ok")
        results = await asyncio.gather(
            pool.score(ray.put(hanging), 3), *(pool.score(ray.put(fine), 2) for _ in range(4))
        )
        close(pool)
        return results, pool.num_replaced

    (first, *others), replaced = asyncio.run(asyncio.wait_for(run(), 90))
    assert first[0]["rewards"] == [1.0, -1.0, 1.0]
    assert first[0]["outcomes"] == {"ok": 2, "exhausted": 1, "timeout": 0, "error": 0}
    assert all(o[0]["rewards"] == [1.0, 1.0] for o in others)
    assert replaced == 2


@pytest.mark.parametrize("text", ["die", "raise"])
def test_what_the_machinery_causes_is_never_a_reward(local_ray: None, text: str) -> None:
    async def run() -> int:
        pool = make_pool(Awkward, max_retries=1)
        with pytest.raises(VerifierFailed) as caught:
            await pool.score(ray.put(texts("ok", text)), 2)
        assert caught.value.reason is DropReason.VERIFIER_ERROR
        summary, _ = await pool.score(ray.put(texts("ok")), 1)  # the pool is whole again
        close(pool)
        return summary["rewards"]

    assert asyncio.run(asyncio.wait_for(run(), 90)) == [1.0]


def test_the_built_in_actor_scores_by_reference(local_ray: None) -> None:
    async def run() -> RolloutGroup:
        pool = VerifierPool(lambda: VerifierActor.options(num_cpus=0).remote("integer"), VerifierConfig())
        answers = texts("2", " 2 ", "3", "2x")
        _, scored = await pool.score(ray.put(answers), 4)
        group = await scored
        close(pool)
        return group

    scored = asyncio.run(asyncio.wait_for(run(), 60))
    assert scored.query == Query("q1", "1+1=", "2", {"level": "easy"})
    assert scored.rewards().tolist() == [1, 1, 0, 0]


def test_a_worker_that_never_starts_is_not_the_answers_fault(local_ray: None) -> None:
    async def run() -> None:
        pool = VerifierPool(
            lambda: Awkward.options(num_cpus=10_000).remote(), VerifierConfig(num_workers=1, start_deadline_s=1)
        )
        with pytest.raises(VerifierFailed) as caught:
            await pool.score(ray.put(texts("ok")), 1)
        assert caught.value.reason is DropReason.VERIFIER_TIMEOUT
        close(pool)

    asyncio.run(asyncio.wait_for(run(), 60))
