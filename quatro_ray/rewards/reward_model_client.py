"""A reward that a reward model gives: spreads the responses over its engines."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from quatro_ray.config import ModelRewardConfig
from quatro_ray.errors import last_line
from quatro_ray.failures import RewardUnavailable
from quatro_ray.types import Query, Response

REST_S = 10.0
"""How long an engine that failed is asked last: a dead one fails at once, so it would always be the least loaded."""


@dataclass
class _Engine:
    actor: Any
    num_running: int = 0
    rests_until: float = 0.0


class ModelReward:
    """The logit of the reward model for prompt and response (engines/reward_model.py).

    Each response goes to the engine with the fewest under way. Where that one fails, it goes to the next, until each
    has had its turn or timeout_s is over.

    Args:
        engines: actor handles, or anything whose `.score.remote(prompt, text)` can be awaited. They hold timeout_s
            too, so what is given up on here does not go on there.
    """

    def __init__(self, config: ModelRewardConfig, engines: Sequence[Any]) -> None:
        if not engines:
            raise ValueError("ModelReward needs at least one engine")
        self._timeout_s = config.timeout_s
        self._engines = [_Engine(actor) for actor in engines]

    async def __call__(self, query: Query, response: Response) -> float:
        """One logit, not bounded to any range.

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
        """The engines belong to whoever started them."""

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
            # Ray's errors, which this layer does not know, and the engine's own, which arrive as one of those
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
