"""Scores a response: the weighted sum of all rewards that apply, with worker processes and servers side by side."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence

from quatro_ray.config import CodeRewardConfig, RewardConfig, VerifierConfig
from quatro_ray.config.rewards import MAX_ABS_REWARD
from quatro_ray.failures import RewardUnavailable
from quatro_ray.isolation.self_test import self_test
from quatro_ray.rewards.base import RemoteReward
from quatro_ray.rewards.registry import REMOTE, applies
from quatro_ray.rewards.workers import LocalScore, RewardProcesses
from quatro_ray.types import Outcome, Query, Response, Score

_RULE = f"a reward must be a finite number between {-MAX_ABS_REWARD:g} and {MAX_ABS_REWARD:g}"


class Scorer:
    """Computes the score of a response from all rewards that apply to its query.

    Args:
        rewards: all rewards, by name.
        remote: the rewards that servers compute, by name; all others run in worker processes.
        sandboxed: names of the rewards whose worker processes run inside the sandbox, because they execute responses.
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
        local = {name: reward for name, reward in rewards.items() if not isinstance(reward, REMOTE)}
        inside = {name: reward for name, reward in local.items() if name in sandboxed}
        outside = {name: reward for name, reward in local.items() if name not in sandboxed}
        self._needs_sandbox = bool(inside) or any(isinstance(reward, CodeRewardConfig) for reward in local.values())
        self._processes = [
            (tuple(some), RewardProcesses(config, some, sandboxed=some is inside)) for some in (outside, inside) if some
        ]

    async def start(self) -> None:
        """Start the worker processes.

        Raises:
            SandboxError: responses are to be executed, and the sandbox does not hold on this machine.
            ConfigError: a reward cannot be made.
            RewardUnavailable: no worker process starts.
        """
        if self._needs_sandbox:
            await asyncio.to_thread(self_test)
        for _, processes in self._processes:
            await processes.start()

    async def close(self) -> None:
        """End the worker processes, and close the rewards that servers compute."""
        for _, processes in self._processes:
            await processes.close()
        await asyncio.gather(*(reward.close() for reward in self._remote.values()))

    async def __call__(self, query: Query, response: Response) -> Score:
        """Return the score of the response.

        Raises:
            RewardUnavailable: a reward could not be computed through no fault of the response.
        """
        if response.exhausted:
            return Score(self._config.exhausted_reward, Outcome.EXHAUSTED, "the episode exceeded its limits twice")
        names = [name for name, reward in self._rewards.items() if applies(reward, query)]
        local_names = [name for name in names if name not in self._remote]
        local, remote = await asyncio.gather(
            self._score_locally(query, response, local_names),
            self._score_remotely(query, response, [name for name in names if name in self._remote]),
        )
        if local.values is None:
            return Score(self._config.exhausted_reward, Outcome.EXHAUSTED, local.detail)
        both = {**local.values, **remote}
        values = {name: both[name] for name in names}
        if wrong := [name for name, value in values.items() if not abs(value) <= MAX_ABS_REWARD]:
            raise RewardUnavailable(f"rewards.{wrong[0]} gave {values[wrong[0]]}: {_RULE}")
        total = sum(self._rewards[name].weight * value for name, value in values.items())
        if not abs(total) <= MAX_ABS_REWARD:
            raise RewardUnavailable(f"the weighted sum of {values} is {total}: {_RULE}")
        outcome = Outcome.UNREADABLE if local.unreadable else Outcome.OK
        return Score(total, outcome, local.unreadable, values, local.printed)

    async def _score_remotely(self, query: Query, response: Response, names: Sequence[str]) -> dict[str, float]:
        values = await asyncio.gather(*(self._remote[name](query, response) for name in names))
        return dict(zip(names, values, strict=True))

    async def _score_locally(self, query: Query, response: Response, names: Sequence[str]) -> LocalScore:
        values: dict[str, float] = {}
        unreadable, printed = [], ""
        for own, processes in self._processes:
            if wanted := [name for name in names if name in own]:
                score = await processes.score(query, response, wanted)
                if score.values is None:
                    return score
                values |= score.values
                unreadable += [score.unreadable] if score.unreadable else []
                printed += score.printed
        return LocalScore(values, unreadable="; ".join(unreadable), printed=printed)
