"""The processes of an environment's episodes as a Ray actor."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import ray

from quatro_ray.actors.base import WATCHED, HostMixin
from quatro_ray.actors.calls import value_or_cancel
from quatro_ray.config import EnvironmentConfig
from quatro_ray.data.chat_template import encode_prompt
from quatro_ray.environments.episode import Episode
from quatro_ray.environments.registry import episode_workers
from quatro_ray.isolation.self_test import self_test
from quatro_ray.seeding import seed_of
from quatro_ray.types import GenerationSummary, Query, Rollout, RolloutGroup, SamplingParams

T = TypeVar("T")


@ray.remote(concurrency_groups=WATCHED)
class EnvironmentActor(HostMixin):
    """`model_path`: for its tokenizer."""

    def __init__(self, config: EnvironmentConfig, model_path: str) -> None:
        self._config = config
        self._model_path = model_path
        self._pool = episode_workers(config)
        self._tokenizer: Any = None

    async def start(self) -> None:
        """Starts nothing again when it already runs. Raises SandboxError where it needs one that holds and has none."""
        if self._tokenizer is None:
            from transformers import AutoTokenizer

            if self._config.sandbox:
                await asyncio.to_thread(self_test)
            self._tokenizer = AutoTokenizer.from_pretrained(self._model_path)
            await self._pool.start(1)

    @ray.method(num_returns=2)
    async def play(
        self, engine: Any, group_id: int, query: Query, sampling: SamplingParams, size: int
    ) -> tuple[GenerationSummary, RolloutGroup]:
        """`size` episodes with a generator actor; returns what that one's `generate` returns."""
        prompt_ids = encode_prompt(self._tokenizer, query.prompt)
        rollouts = await _all(
            Episode(
                self._config, self._tokenizer, _RemoteEngine(engine), query, prompt_ids, _of_rollout(sampling, i)
            ).play(self._pool)
            for i in range(size)
        )
        group = RolloutGroup(group_id, query, np.asarray(prompt_ids, dtype=np.int32), tuple(rollouts))
        return group.summary(), group

    async def shutdown(self) -> None:
        await self._pool.close()


class _RemoteEngine:
    """A generator actor as environments/episode.py sees it."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    async def complete(self, token_ids: Sequence[int], sampling: SamplingParams, stop: Sequence[str]) -> Rollout:
        return await value_or_cancel(self._actor.complete.remote(list(token_ids), sampling, list(stop)))


def _of_rollout(sampling: SamplingParams, index: int) -> SamplingParams:
    return sampling if sampling.seed is None else replace(sampling, seed=seed_of(sampling.seed, "rollout", index))


async def _all(work: Any) -> list[Any]:
    """Like gather; where one fails, the others are ended before that is told."""
    tasks = [asyncio.ensure_future(w) for w in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
