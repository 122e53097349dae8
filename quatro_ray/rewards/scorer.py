"""From a response to its score: the weighted sum of the parts that apply, worker processes and servers side by side."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Collection, Mapping, Sequence

from quatro_ray.config import CodeRewardConfig, RewardConfig, VerifierConfig
from quatro_ray.failures import RewardUnavailable
from quatro_ray.isolation.self_test import self_test
from quatro_ray.rewards.base import RemoteReward
from quatro_ray.rewards.registry import REMOTE, applies
from quatro_ray.rewards.workers import Judged, RewardProcesses
from quatro_ray.types import Outcome, Query, Response, Score


class Scorer:
    """`remote`: the rewards that servers judge, by name; all others of `rewards` run in worker processes.

    Args:
        sandboxed: names of parts whose worker runs inside the sandbox, because they execute responses.
    """

    def __init__(
        self,
        rewards: Mapping[str, RewardConfig],
        config: VerifierConfig,
        remote: Mapping[str, RemoteReward],
        sandboxed: Collection[str] = (),
    ) -> None:
        self._rewards = rewards
        self._config = config
        self._remote = remote
        local = {name: part for name, part in rewards.items() if not isinstance(part, REMOTE)}
        inside = {name: part for name, part in local.items() if name in sandboxed}
        outside = {name: part for name, part in local.items() if name not in sandboxed}
        self._needs_sandbox = bool(inside) or any(isinstance(part, CodeRewardConfig) for part in local.values())
        self._pools = [
            (tuple(parts), RewardProcesses(config, parts, sandboxed=parts is inside))
            for parts in (outside, inside)
            if parts
        ]

    async def start(self) -> None:
        """Raises SandboxError where responses are to be executed and the sandbox does not hold on this machine."""
        if self._needs_sandbox:
            await asyncio.to_thread(self_test)
        for _, pool in self._pools:
            await pool.start()

    async def close(self) -> None:
        for _, pool in self._pools:
            await pool.close()
        await asyncio.gather(*(reward.close() for reward in self._remote.values()))

    async def __call__(self, query: Query, response: Response) -> Score:
        """Raises RewardUnavailable where a part could not be judged through no fault of the response."""
        if response.exhausted:
            return Score(self._config.exhausted_reward, Outcome.EXHAUSTED, "the episode used up its limits twice")
        names = [name for name, part in self._rewards.items() if applies(part, query)]
        local = [name for name in names if name not in self._remote]
        judged, remote = await asyncio.gather(
            self._judge_locally(query, response, local),
            self._judge_remotely(query, response, [name for name in names if name in self._remote]),
        )
        if judged.parts is None:
            return Score(self._config.exhausted_reward, Outcome.EXHAUSTED, judged.detail)
        both = {**judged.parts, **remote}
        parts = {name: both[name] for name in names}
        if wrong := [name for name, value in parts.items() if not math.isfinite(value)]:
            raise RewardUnavailable(f"rewards.{wrong[0]} gave {parts[wrong[0]]}: a reward must be a finite number")
        total = sum(self._rewards[name].weight * value for name, value in parts.items())
        if not math.isfinite(total):
            raise RewardUnavailable(f"the weighted sum of {parts} is {total}: a reward must be a finite number")
        return Score(total, reward_values=parts)

    async def _judge_remotely(self, query: Query, response: Response, names: Sequence[str]) -> dict[str, float]:
        values = await asyncio.gather(*(self._remote[name](query, response) for name in names))
        return dict(zip(names, values, strict=True))

    async def _judge_locally(self, query: Query, response: Response, names: Sequence[str]) -> Judged:
        parts: dict[str, float] = {}
        for own, pool in self._pools:
            if wanted := [name for name in names if name in own]:
                judged = await pool.judge(query, response, wanted)
                if judged.parts is None:
                    return judged
                parts |= judged.parts
        return Judged(parts)
