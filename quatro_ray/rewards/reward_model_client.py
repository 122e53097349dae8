"""The reward of a reward model: balances the responses over its engines."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from typing import Protocol

from quatro_ray.config import ModelRewardConfig
from quatro_ray.errors import last_line
from quatro_ray.failures import RewardUnavailable
from quatro_ray.types import Query, Response

REST_S = 10.0
"""Seconds for which an engine that failed is asked last: a dead one fails at once, so it always has the least load."""


class ScoreMethod(Protocol):
    """The remote method `score` of a reward-model engine; it returns one logit."""

    def remote(self, prompt: str, response: str) -> Awaitable[float]:
        """Start to score a response to the prompt, and return an awaitable of the logit."""
        ...


class RewardModelHandle(Protocol):
    """A handle of a RewardModelActor (actors/reward_model.py)."""

    @property
    def score(self) -> ScoreMethod:
        """The remote method `score` of the actor."""
        ...


@dataclass
class _Engine:
    actor: RewardModelHandle
    num_running: int = 0
    rests_until: float = 0.0


class ModelReward:
    """The logit of the reward model for prompt and response (engines/reward_model.py).

    Each response goes to the engine with the fewest requests in flight. If that engine fails, the next one is asked,
    until every engine has been asked once or timeout_s has passed.

    Args:
        engines: actor handles. The engines enforce timeout_s too, so a request that is abandoned here ends there.
    """

    def __init__(self, config: ModelRewardConfig, engines: Sequence[RewardModelHandle]) -> None:
        if not engines:
            raise ValueError("ModelReward needs at least one engine")
        self._timeout_s = config.timeout_s
        self._engines = [_Engine(actor) for actor in engines]

    async def __call__(self, query: Query, response: Response) -> float:
        """Return one logit, which is not bounded.

        Raises:
            RewardUnavailable: no engine answered, or not within timeout_s.
        """
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._first_answer(query.prompt, response.text)
        except TimeoutError as error:
            raise RewardUnavailable(
                f"the reward model did not answer within timeout_s={self._timeout_s:g} s"
            ) from error

    async def close(self) -> None:
        """Do nothing: the orchestrator started the engines and ends them."""

    async def _first_answer(self, prompt: str, text: str) -> float:
        untried = list(self._engines)
        while True:
            engine = self._least_loaded(untried)
            untried.remove(engine)
            engine.num_running += 1
            try:
                score = float(await engine.actor.score.remote(prompt, text))
                engine.rests_until = 0.0
                return score
            # any exception: this layer does not import Ray, whose errors also carry those of the engine
            except Exception as error:
                engine.rests_until = asyncio.get_running_loop().time() + REST_S
                if not untried:
                    raise RewardUnavailable(
                        f"none of {len(self._engines)} reward model engines answered; the last one: {last_line(error)}"
                    ) from error
            finally:
                engine.num_running -= 1

    def _least_loaded(self, engines: list[_Engine]) -> _Engine:
        now = asyncio.get_running_loop().time()
        return min(engines, key=lambda e: (e.rests_until > now, e.num_running))
