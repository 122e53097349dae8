"""Checks which queries the rewards can score: many rows in parallel, and none twice.

Whether math-verify reads an answer takes about 10 ms, so 20,000 rows would take minutes at every start.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict

from quatro_ray.config import RewardConfig, SandboxFusionRewardConfig
from quatro_ray.errors import DataError
from quatro_ray.isolation.worker_pool import Exhausted, ProcessPool, WorkerLost, in_the_open
from quatro_ray.rewards.base import CheckingReward, Reward
from quatro_ray.rewards.program_cases import check_cases
from quatro_ray.rewards.registry import REMOTE, applies, make_reward
from quatro_ray.rewards.verdicts import Verdicts
from quatro_ray.types import Query

Check = Callable[[Query], str | None]
"""Returns why responses to a query cannot be scored, or None if they can."""
Say = Callable[[str], None]
"""Shows a line of progress."""
PROGRAM = "quatro_ray.rewards.worker"
_ALONE_S = 1.0
"""Time after which the remaining queries are checked by other processes, which take about as long to start."""
_CHUNK = 100
_CHUNK_DEADLINE_S = 600.0
_START_DEADLINE_S = 120.0
_MEMORY_MIB = 2048
_MAX_PROCESSES = 16
_SECONDS_BETWEEN_LINES = 5.0


class QueryChecks:
    """The checks of all configured rewards.

    Args:
        rewards: by name.
        say: shows how far a long check has come, every few seconds.

    Raises:
        ConfigError: a reward cannot be made.
    """

    def __init__(self, rewards: Mapping[str, RewardConfig], say: Say) -> None:
        self._say = say
        self._rewards = rewards
        made = {name: make_reward(config) for name, config in rewards.items() if not isinstance(config, REMOTE)}
        self._local = checks_of(made)
        self._remote: dict[str, Check] = dict.fromkeys(
            [name for name, config in rewards.items() if isinstance(config, SandboxFusionRewardConfig)], check_cases
        )

    def reasons(self, queries: Sequence[Query], label: str) -> list[str | None]:
        """Return for each query why it cannot be scored, or None if it can.

        Args:
            queries: those of one source.
            label: section of the data, for messages.

        Raises:
            DataError: the check of some rows fails or does not end.
        """
        local = self._first(queries)
        if len(local) < len(queries):
            local += self._many(queries[len(local) :], label)
        return [
            reason or first_reason(query, self._remote, self._rewards)
            for query, reason in zip(queries, local, strict=True)
        ]

    def _first(self, queries: Sequence[Query]) -> list[str | None]:
        """Check queries in this process, the first ones or all, until they have taken a while."""
        begun = time.monotonic()
        reasons: list[str | None] = []
        for query in queries:
            if time.monotonic() - begun > _ALONE_S:
                break
            reasons.append(first_reason(query, self._local, self._rewards))
        return reasons

    def _many(self, queries: Sequence[Query], label: str) -> list[str | None]:
        verdicts = Verdicts({name: self._rewards[name] for name in self._local})
        unknown = [query for query in queries if not verdicts.has(query)]
        if unknown:
            failures: list[BaseException] = []
            try:
                asyncio.run(self._check(unknown, verdicts, Counting(label, len(unknown), self._say)))
            except* (Exhausted, WorkerLost) as errors:
                failures.extend(errors.exceptions)
            if failures:
                raise DataError(
                    f"data.{label}: the check of its rows fails ({failures[0]}); look for answers that cannot be "
                    "compared, or remove the reward"
                ) from failures[0]
            if verdicts.problem:
                self._say(f"{verdicts.problem}; the answers of data.{label} are checked again at the next start")
        return [verdicts.reason(query) for query in queries]

    async def _check(self, queries: Sequence[Query], verdicts: Verdicts, counting: Counting) -> None:
        """Check queries in processes of their own, and keep each verdict as soon as it is known."""
        chunks = [queries[start : start + _CHUNK] for start in range(0, len(queries), _CHUNK)]
        num_workers = min(len(os.sched_getaffinity(0)), _MAX_PROCESSES, len(chunks))
        pool = ProcessPool(
            in_the_open(PROGRAM),
            {"rewards": {name: self._rewards[name].model_dump(mode="json") for name in self._local}},
            num_workers=num_workers,
            memory_mib=_MEMORY_MIB,
            start_deadline_s=_START_DEADLINE_S,
            recycle_after=len(chunks),
        )

        async def check(chunk: Sequence[Query]) -> None:
            request = {"check": [asdict(query) for query in chunk]}
            answer = await pool.use(lambda worker: worker.ask(request, _CHUNK_DEADLINE_S))
            if "error" in answer:
                raise WorkerLost(answer["error"], by_item=False)
            verdicts.add(zip(chunk, answer["reasons"], strict=True))
            counting.add(len(chunk))

        try:
            await pool.start(num_workers)
            async with asyncio.TaskGroup() as group:
                for chunk in chunks:
                    group.create_task(check(chunk))
        finally:
            await pool.close()


def checks_of(rewards: Mapping[str, Reward]) -> dict[str, Check]:
    """Return the checks of those rewards that have one, by name."""
    return {name: reward.check for name, reward in rewards.items() if isinstance(reward, CheckingReward)}


def first_reason(query: Query, checks: Mapping[str, Check], configs: Mapping[str, RewardConfig]) -> str | None:
    """Return the first reason for which one of the rewards cannot score responses to the query, or None."""
    for name, check in checks.items():
        if applies(configs[name], query) and (reason := check(query)):
            return f"rewards.{name} {reason}"
    return None


class Counting:
    """Says how many rows of a source have been checked, every few seconds."""

    def __init__(self, label: str, total: int, say: Say) -> None:
        self._label = label
        self._total = total
        self._say = say
        self._done = 0
        self._said_at = time.monotonic()

    def add(self, num: int) -> None:
        """Count `num` rows more."""
        self._done += num
        if time.monotonic() - self._said_at >= _SECONDS_BETWEEN_LINES:
            self._said_at = time.monotonic()
            self._say(f"data.{self._label}: {self._done:,} of {self._total:,} answers checked")
