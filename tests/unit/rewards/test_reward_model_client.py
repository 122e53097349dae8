"""Where a reward model's responses go, and what happens when an engine does not answer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from quatro_ray.config import ModelRewardConfig
from quatro_ray.failures import RewardUnavailable
from quatro_ray.rewards.reward_model_client import ModelReward
from quatro_ray.types import Query, Response

QUERY, RESPONSE = Query("q", "1+1=", "2"), Response("2", 1, False)


class Engine:
    """Has the form of an actor handle: engine.score.remote(prompt, text) can be awaited."""

    def __init__(self, answer: Callable[[], Awaitable[float]]) -> None:
        self.score = self
        self.asked: list[tuple[str, str]] = []
        self._answer = answer

    def remote(self, prompt: str, text: str) -> Awaitable[float]:
        self.asked.append((prompt, text))
        return self._answer()


def after(seconds: float, score: float = 1.5) -> Callable[[], Awaitable[float]]:
    async def answer() -> float:
        await asyncio.sleep(seconds)
        return score

    return answer


async def dies() -> float:
    raise RuntimeError("traceback\nthe actor died")


def ask(*engines: Engine, times: int = 1, timeout_s: float = 2) -> list[Any]:
    async def run() -> list[Any]:
        reward = ModelReward(ModelRewardConfig(kind="model", path="rm", timeout_s=timeout_s), engines)
        calls = (reward(QUERY, RESPONSE) for _ in range(times))
        answers = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 10)
        await reward.close()
        return answers

    return asyncio.run(run())


def test_the_score_is_the_reward() -> None:
    engine = Engine(after(0, -7.25))
    assert ask(engine) == [-7.25] and engine.asked == [("1+1=", "2")]


def test_responses_go_to_the_engine_with_the_fewest() -> None:
    engines = [Engine(after(0.05)) for _ in range(3)]
    ask(*engines, times=9)
    assert [len(e.asked) for e in engines] == [3, 3, 3]


def test_a_dead_engine_which_is_always_idle_does_not_attract_everything() -> None:
    dead, alive = Engine(dies), Engine(after(0.05))

    async def run() -> None:
        reward = ModelReward(ModelRewardConfig(kind="model", path="rm"), [dead, alive])
        for _ in range(5):
            assert await reward(QUERY, RESPONSE) == 1.5

    asyncio.run(run())
    assert (len(dead.asked), len(alive.asked)) == (1, 5)


def test_all_engines_dead() -> None:
    engines = [Engine(dies), Engine(dies)]
    [error] = ask(*engines)
    assert isinstance(error, RewardUnavailable)
    assert str(error) == "none of 2 reward model engines answered; the last one: the actor died"
    assert [len(e.asked) for e in engines] == [1, 1]


def test_the_deadline_is_for_all_engines_together() -> None:
    [error] = ask(Engine(after(60)), Engine(after(60)), timeout_s=0.1)
    assert isinstance(error, RewardUnavailable) and "within timeout_s=0.1 s" in str(error)


def test_no_engines_at_all() -> None:
    with pytest.raises(ValueError, match="at least one engine"):
        ModelReward(ModelRewardConfig(kind="model", path="rm"), [])
