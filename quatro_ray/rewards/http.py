"""The reward of an HTTP server, many responses in one request. examples/reward_server.py is such a server."""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass

from quatro_ray.config import HttpRewardConfig
from quatro_ray.failures import RewardUnavailable
from quatro_ray.rewards.http_client import JsonClient
from quatro_ray.types import Query, Response


@dataclass(frozen=True)
class _Pending:
    """A response whose caller waits for `reward`."""

    query: Query
    response: Response
    reward: asyncio.Future[float]


class HttpReward:
    """OpenRLHF's interface: POST {"query", "prompts", "responses", "labels", "metadata"} → {"rewards": [float, …]}.

    The five fields are lists of the same length. They hold prompt and response as one text, the prompt, the response,
    the query's answer, and its metadata as an object. The prompt of a chat is the JSON text of its messages.
    A server may call the rewards `scores`; all other fields of its answer are ignored, such as OpenRLHF's `extra_logs`.

    A batch is sent when max_batch responses wait, or max_wait_s after the first of them arrived. The batch succeeds or
    fails as a whole: if its request fails, or one of its rewards is missing or not finite, no caller gets a reward.
    """

    def __init__(self, config: HttpRewardConfig, client: JsonClient | None = None) -> None:
        self._config = config
        self._client = client or JsonClient(config)
        self._waiting: list[_Pending] = []
        self._timer: asyncio.TimerHandle | None = None
        self._requests: set[asyncio.Task[None]] = set()
        self._closed = False

    async def __call__(self, query: Query, response: Response) -> float:
        """Return the server's reward, after at most the tries of this request and of those queued before it.

        Raises:
            RewardUnavailable: the server gave no reward.
        """
        if self._closed:
            raise RewardUnavailable("the reward is closed")
        loop = asyncio.get_running_loop()
        pending = _Pending(query, response, loop.create_future())
        self._waiting.append(pending)
        if len(self._waiting) >= self._config.max_batch:
            self._send_waiting()
        elif self._timer is None:
            self._timer = loop.call_later(self._config.max_wait_s, self._send_waiting)
        return await pending.reward

    async def close(self) -> None:
        """Cancel the requests in flight; their callers get RewardUnavailable."""
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
        batch = [p for p in self._waiting if not p.reward.done()]  # done: its caller was cancelled
        self._waiting = []
        if batch:
            request = asyncio.create_task(self._score(batch))
            self._requests.add(request)
            request.add_done_callback(self._requests.discard)
            request.add_done_callback(lambda task: _settle(batch, task))

    async def _score(self, batch: list[_Pending]) -> None:
        """Send one request and pass the rewards to the callers; `_settle` passes them an error."""
        answer = await self._client.post("", _body(batch))
        for pending, reward in zip(batch, _rewards(answer, len(batch)), strict=True):
            if not pending.reward.done():
                pending.reward.set_result(reward)


def _settle(batch: list[_Pending], request: asyncio.Task[None]) -> None:
    """Pass what ended the request to every caller that still waits, so that none waits for ever."""
    error = RewardUnavailable("the reward was closed") if request.cancelled() else request.exception()
    for pending in batch:
        if error is not None and not pending.reward.done():
            # an exception collects the traceback of every caller that raises it, so each caller gets its own
            own = RewardUnavailable(str(error)) if isinstance(error, RewardUnavailable) else error
            pending.reward.set_exception(own)


def _body(batch: list[_Pending]) -> dict[str, object]:
    return {
        "query": [p.query.prompt + p.response.text for p in batch],
        "prompts": [p.query.prompt for p in batch],
        "responses": [p.response.text for p in batch],
        "labels": [p.query.answer for p in batch],
        "metadata": [dict(p.query.metadata) for p in batch],
    }


def _rewards(answer: dict[str, object], num_responses: int) -> list[float]:
    rewards = answer.get("rewards", answer.get("scores"))
    if not isinstance(rewards, list) or len(rewards) != num_responses:
        got = f"{len(rewards)} of them" if isinstance(rewards, list) else f"{rewards!r:.80}"
        raise RewardUnavailable(
            f"the server must answer {num_responses} responses with a list of as many rewards: {got}"
        )
    return [_finite(reward) for reward in rewards]


def _finite(reward: object) -> float:
    # an integer of 400 digits is valid JSON, but too large for a float
    if (
        not isinstance(reward, int | float)
        or isinstance(reward, bool)
        or abs(reward) > 1e300
        or not math.isfinite(reward)
    ):
        raise RewardUnavailable(f"each of the server's rewards must be a finite number: {reward!r:.80}")
    return float(reward)
