"""A reward that a server gives, many responses in one request. examples/reward_server.py is such a server."""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass
from typing import Any

from quatro_ray.config import HttpRewardConfig
from quatro_ray.failures import RewardUnavailable
from quatro_ray.rewards.http_client import JsonClient
from quatro_ray.types import Query, Response


@dataclass(frozen=True)
class _Asked:
    query: Query
    response: Response
    reward: asyncio.Future[float]


class HttpReward:
    """OpenRLHF's shape: POST {"query", "prompts", "responses", "labels", "metadata"} → {"rewards": [float, …]}.

    All five are lists of the same length: prompt and response in one text, each for itself, the query's answer, and
    its metadata as an object of strings. The prompt of a chat is the JSON text of its messages. A server may call
    the rewards `scores`; anything else that it says, OpenRLHF's `extra_logs` among it, is ignored.

    A batch is sent when max_batch responses wait, or max_wait_s after the first of them came. It has one fate: where
    its request fails, or one of its rewards is missing or no finite number, none of its callers gets a reward.
    """

    def __init__(self, config: HttpRewardConfig, client: JsonClient | None = None) -> None:
        self._config = config
        self._client = client or JsonClient(config)
        self._waiting: list[_Asked] = []
        self._timer: asyncio.TimerHandle | None = None
        self._requests: set[asyncio.Task[None]] = set()
        self._closed = False

    async def __call__(self, query: Query, response: Response) -> float:
        """The server's reward; its wait is bounded by the tries of the request and of those before it in line.

        Raises:
            RewardUnavailable: the server did not judge.
        """
        if self._closed:
            raise RewardUnavailable("the reward is closed")
        loop = asyncio.get_running_loop()
        asked = _Asked(query, response, loop.create_future())
        self._waiting.append(asked)
        if len(self._waiting) >= self._config.max_batch:
            self._send_waiting()
        elif self._timer is None:
            self._timer = loop.call_later(self._config.max_wait_s, self._send_waiting)
        return await asked.reward

    async def close(self) -> None:
        """Ends the requests under way; who still waits for one gets RewardUnavailable."""
        self._closed = True
        self._send_waiting()
        requests = list(self._requests)
        for request in requests:
            request.cancel()
        await asyncio.gather(*requests, return_exceptions=True)
        await self._client.close()

    def _send_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        batch = [asked for asked in self._waiting if not asked.reward.done()]  # done: the caller went away
        self._waiting = []
        if batch:
            request = asyncio.create_task(self._judge(batch))
            self._requests.add(request)
            request.add_done_callback(self._requests.discard)
            request.add_done_callback(lambda task: _settle(batch, task))

    async def _judge(self, batch: list[_Asked]) -> None:
        """One request; its callers get their rewards here, and their error from `_settle`."""
        answer = await self._client.post("", _body(batch))
        for asked, reward in zip(batch, _rewards(answer, len(batch)), strict=True):
            if not asked.reward.done():
                asked.reward.set_result(reward)


def _settle(batch: list[_Asked], request: asyncio.Task[None]) -> None:
    """Nobody waits for ever: whatever ended the request ends the wait, one exception for each."""
    error = RewardUnavailable("the reward was closed") if request.cancelled() else request.exception()
    for asked in batch:
        if error is not None and not asked.reward.done():
            # an exception collects the traceback of everyone who raises it, so each gets its own
            own = RewardUnavailable(str(error)) if isinstance(error, RewardUnavailable) else error
            asked.reward.set_exception(own)


def _body(batch: list[_Asked]) -> dict[str, Any]:
    return {
        "query": [a.query.prompt + a.response.text for a in batch],
        "prompts": [a.query.prompt for a in batch],
        "responses": [a.response.text for a in batch],
        "labels": [a.query.answer for a in batch],
        "metadata": [dict(a.query.metadata) for a in batch],
    }


def _rewards(answer: dict[str, Any], num_asked: int) -> list[float]:
    rewards = answer.get("rewards", answer.get("scores"))
    if not isinstance(rewards, list) or len(rewards) != num_asked:
        got = f"{len(rewards)} of them" if isinstance(rewards, list) else f"{rewards!r:.80}"
        raise RewardUnavailable(f"the server must answer {num_asked} responses with a list of as many rewards: {got}")
    return [_finite(reward) for reward in rewards]


def _finite(reward: Any) -> float:
    is_number = isinstance(reward, int | float) and not isinstance(reward, bool)
    # an integer of 400 digits is valid JSON and no float
    if not is_number or abs(reward) > 1e300 or not math.isfinite(reward):
        raise RewardUnavailable(f"each of the server's rewards must be a finite number: {reward!r:.80}")
    return float(reward)
