"""An engine of tests/unit/world.py, which can die, hang, fail and sleep."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace
from typing import Any

from ray.exceptions import RayTaskError

from quatro_ray.failures import EngineLost
from quatro_ray.types import (
    EngineLoad,
    GenerationSummary,
    Installed,
    Query,
    Rollout,
    RolloutGroup,
    SamplingParams,
    VersionSpan,
)
from tests.make import group, rollout


class FakeGenerator:
    """Takes a random short time; tokens that come after an update carry the new version."""

    def __init__(self, rng: random.Random, failures: int = 0) -> None:
        self.rng, self.failures, self.version, self.running = rng, failures, 0, 0
        self.seeds: list[int | None] = []
        self.died: str | None = None
        self.hung = False
        self.num_sampled = 0
        self.received: int | None = None
        """The version that it received and did not install."""
        self.tells = False
        """Its actor survives it, and says how far each group came."""
        self.continued: list[int] = []
        self.hangs_in: str | None = None
        """"sleep" or "wake_up": the call that it does not answer."""
        self._ended = asyncio.Event()
        self.awake = asyncio.Event()
        self.awake.set()
        self.has_started = True
        """False for one that takes the place of another and does not run yet."""

    async def _alive(self) -> None:
        if self.hung:
            await self._ended.wait()
        if self.died is not None:
            raise EngineLost(self.died)

    async def start(self) -> None:
        await asyncio.sleep(5.0)
        await self._alive()
        self.has_started = True

    async def generate(
        self, group_id: int, query: Query, sampling: SamplingParams, size: int, begun: tuple[Rollout, ...] = ()
    ) -> tuple[GenerationSummary, RolloutGroup]:
        await self._alive()
        if begun:
            self.continued.append(group_id)
        self.running += 1
        start = self.version
        self.seeds.append(sampling.seed)
        try:
            await asyncio.sleep(self.rng.random() * 0.4)
            await self.awake.wait()
            if self.died is not None and self.tells:
                raise EngineLost(self.died, (_rollout([start]),) * size, core_died=True)
            await self._alive()
            if self.failures > 0:
                self.failures -= 1
                raise RayTaskError("generate", "out of memory", ValueError("out of memory"))
        finally:
            self.running -= 1
        self.num_sampled += 1
        versions = [start] if start == self.version else [start, self.version]
        made = replace(group(group_id, *(_rollout(versions) for _ in range(size))), query=query)
        return made.summary(), made

    async def load(self) -> EngineLoad:
        if self.died is not None and self.tells:
            return EngineLoad(self.running, 0, self.num_sampled, is_alive=False)
        await self._alive()
        return EngineLoad(self.running, 0, self.num_sampled, is_alive=True)

    async def pause(self) -> int:
        await self._alive()
        return self.running

    async def resume(self) -> None:
        await self._alive()

    async def sleep(self) -> None:
        await self._alive()
        if self.hangs_in == "sleep":
            await self._ended.wait()
        self.awake.clear()

    async def wake_up(self) -> None:
        await self._alive()
        if self.hangs_in == "wake_up":
            await self._ended.wait()
        self.awake.set()

    async def receive_weights(self) -> None:
        await self._alive()
        assert self.awake.is_set()
        self.received = None

    async def install_weights(self, version: int) -> Installed:
        await self._alive()
        assert self.received == version
        self.version, self.received = version, None
        return Installed(version, self.running, 0.0)

    async def policy_version(self) -> int:
        await self._alive()
        return self.version

    async def score(self, sequences: list[list[int]]) -> list[list[float]]:
        raise NotImplementedError("the world has no tokens")

    async def sampling_error(self, sequences: list[list[int]]) -> float:
        raise NotImplementedError("the world has no tokens")

    async def parameter_checksums(self) -> list[dict[str, str]]:
        raise NotImplementedError("the world has no parameters")

    async def stacks(self) -> str:
        return "generating"

    def kill(self) -> None:
        self.died, self.tells = self.died or "it was killed", False
        self._ended.set()
        self.awake.set()


def _rollout(versions: list[int]) -> Any:
    """Three tokens, the last ones of the newer version."""
    spans = [VersionSpan(versions[0], 0, 1), VersionSpan(versions[-1], 1, 3)]
    return replace(rollout(), spans=tuple(spans if len(versions) > 1 else [VersionSpan(versions[0], 0, 3)]))
