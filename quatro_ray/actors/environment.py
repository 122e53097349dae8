"""The Ray actor that plays an environment's episodes in worker processes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterable, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np
import ray
from ray.actor import ActorHandle

from quatro_ray.actors.base import WATCHED, HostMixin
from quatro_ray.actors.calls import value_or_cancel
from quatro_ray.config import EnvironmentConfig
from quatro_ray.data.chat_template import Tokenizer, encode_prompt, prompt_tail
from quatro_ray.environments.episode import Episode
from quatro_ray.environments.registry import episode_workers
from quatro_ray.isolation.self_test import self_test
from quatro_ray.seeding import seed_of
from quatro_ray.types import GenerationSummary, Query, Rollout, RolloutGroup, SamplingParams

T = TypeVar("T")


@ray.remote(concurrency_groups=WATCHED)
class EnvironmentActor(HostMixin):
    """Plays groups of episodes.

    Args:
        model_path: folder or name of the model whose tokenizer is used.
    """

    def __init__(self, config: EnvironmentConfig, model_path: str) -> None:
        self._config = config
        self._model_path = model_path
        self._pool = episode_workers(config)
        self._tokenizer: Tokenizer | None = None

    async def start(self) -> None:
        """Load the tokenizer and start one process; do nothing if this has been done.

        Raises:
            SandboxError: the environment needs the sandbox, and it does not hold on this machine.
            ConfigError: the environment's function cannot be loaded.
        """
        if self._tokenizer is None:
            from transformers import AutoTokenizer

            if self._config.sandbox:
                await asyncio.to_thread(self_test)
            self._tokenizer = AutoTokenizer.from_pretrained(self._model_path)
            await self._pool.start(1)

    @ray.method(num_returns=2)
    async def play(
        self, engine: ActorHandle, group_id: int, query: Query, sampling: SamplingParams, size: int
    ) -> tuple[GenerationSummary, RolloutGroup]:
        """Play a group of episodes, and return its summary and the group.

        Args:
            engine: the generator actor that samples the policy's turns.
            group_id: id that the returned group carries; it has no effect on the episodes.
            query: its prompt begins every episode, and the environment's function receives all its fields.
            sampling: `max_tokens` bounds each response; each episode derives its own seed from `seed`.
            size: number of episodes.

        Raises:
            EnvironmentFailed: an episode failed through no fault of the policy.
        """
        assert self._tokenizer is not None
        prompt_ids = encode_prompt(self._tokenizer, query.prompt)
        rollouts = await _all(
            Episode(
                self._config, self._tokenizer, _RemoteEngine(engine), query, prompt_ids, _of_rollout(sampling, i)
            ).play(self._pool)
            for i in range(size)
        )
        tail = prompt_tail(self._tokenizer, query.prompt)
        group = RolloutGroup(group_id, query, np.asarray(prompt_ids, dtype=np.int32), tuple(rollouts), tail)
        return group.summary(), group

    async def shutdown(self) -> None:
        """End the worker processes."""
        await self._pool.close()


class _RemoteEngine:
    """A generator actor as the Engine of environments/episode.py."""

    def __init__(self, actor: ActorHandle) -> None:
        self._actor = actor

    async def complete(self, token_ids: Sequence[int], sampling: SamplingParams, stop: Sequence[str]) -> Rollout:
        rollout: Rollout = await value_or_cancel(self._actor.complete.remote(list(token_ids), sampling, list(stop)))
        return rollout


def _of_rollout(sampling: SamplingParams, index: int) -> SamplingParams:
    return sampling if sampling.seed is None else replace(sampling, seed=seed_of(sampling.seed, "rollout", index))


async def _all(work: Iterable[Awaitable[T]]) -> list[T]:
    """Return all results; if one fails, cancel the others and wait until they have ended before raising."""
    tasks = [asyncio.ensure_future(w) for w in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
