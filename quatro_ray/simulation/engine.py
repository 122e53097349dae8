"""An engine that takes the time of continuous batching and returns groups without content."""

from __future__ import annotations

import asyncio
import bisect
from collections import deque
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from quatro_ray.failures import EngineLost
from quatro_ray.simulation.decoding import Batch
from quatro_ray.simulation.workload import Workload
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


@dataclass
class _Request:
    """A group in the engine: lengths of its responses, the progress at which each began, and how many are not done."""

    lengths: list[int]
    begun: list[float] = field(default_factory=list)
    num_left: int = 0
    done: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class SimulatedEngine:
    """Implements actors/interfaces.py:Engine in virtual time.

    Args:
        workload: speeds, lengths and failures.
    """

    def __init__(self, workload: Workload) -> None:
        self._workload = workload
        self._batch = Batch(workload.engine)
        self._waiting: deque[tuple[_Request, int]] = deque()
        self._sequences: dict[int, _Request] = {}
        self._num_sequences = 0
        self._requests: list[_Request] = []
        self._num_generated = 0
        self._paused = False
        self._died: str | None = None
        self._at = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._death: asyncio.TimerHandle | None = None
        self._versions: list[tuple[float, int]] = [(0.0, 0)]  # from this progress on, tokens are of this version

    async def start(self) -> None:
        """Take the time of a start; the engine's life begins."""
        await asyncio.sleep(self._workload.start_s)
        self.live()

    def live(self) -> None:
        """Begin the time after which the engine is lost."""
        self._at = asyncio.get_running_loop().time()
        if (mean := self._workload.engine_lives_s) is not None:
            life = self._workload.rng.expovariate(1 / mean)
            self._death = asyncio.get_running_loop().call_later(life, self._die, "its time had come")

    async def generate(
        self, group_id: int, query: Query, sampling: SamplingParams, group_size: int, begun: tuple[Rollout, ...] = ()
    ) -> tuple[GenerationSummary, RolloutGroup]:
        """Return the group when its longest response is done. A group that another engine began starts again."""
        self._check()
        lengths = self._workload.lengths.draw(group_id, group_size, self._workload.seed)
        request = _Request(lengths, [0.0] * group_size, group_size)
        self._requests.append(request)
        self._catch_up()
        self._waiting.extend((request, i) for i in range(group_size))
        self._go_on()
        try:
            await request.done
        finally:
            self._requests.remove(request)
        self._num_generated += sum(lengths)
        rollouts = tuple(map(self._rollout, request.begun, lengths))
        group = RolloutGroup(group_id, query, np.ones(1, dtype=np.int32), rollouts)
        return group.summary(), group

    def _rollout(self, begun: float, length: int) -> Rollout:
        """Return a rollout whose spans have the shares of the versions that sampled it."""
        num_items = self._workload.num_items(length)
        first = bisect.bisect_right(self._versions, (begun, 1 << 60)) - 1
        last = bisect.bisect_left(self._versions, (begun + length, -1))
        cuts = [round((p - begun) / length * num_items) for p, _ in self._versions[first + 1 : last]]
        versions = [version for _, version in self._versions[first:last]]
        spans = [
            VersionSpan(version, start, end)
            for version, (start, end) in zip(versions, pairwise([0, *cuts, num_items]), strict=True)
            if start < end
        ]
        ids, logprobs = np.ones(num_items, dtype=np.int32), np.zeros(num_items, dtype=np.float32)
        return Rollout(ids, logprobs, tuple(spans), text="", finish_reason="stop")

    async def load(self) -> EngineLoad:
        """Return the engine's work."""
        self._check()
        self._catch_up()
        return EngineLoad(len(self._requests), self._num_generated, int(self._batch.num_sampled), is_alive=True)

    async def pause(self) -> int:
        """Stop decoding, and return the number of groups."""
        self._check()
        self._catch_up()
        self._paused = True
        self._go_on()
        return len(self._requests)

    async def resume(self) -> None:
        """Continue."""
        self._check()
        self._at = asyncio.get_running_loop().time()
        self._paused = False
        self._go_on()

    async def sleep(self) -> None:
        """Freeze all requests, as `pause` does; a simulated device has no memory to free."""
        await self.pause()

    async def wake_up(self) -> None:
        """Continue all requests. The time to compute their keys and values again is not simulated."""
        await self.resume()

    def receive(self, version: int) -> None:
        """Take the weights of `version`; raise EngineLost if the engine is gone."""
        self._check()
        self._versions.append((self._batch.progress, version))

    async def receive_weights(self) -> None:
        """Raise: a simulated engine is paused during transfers."""
        raise NotImplementedError("a simulated engine is paused during transfers")

    async def install_weights(self, version: int) -> Installed:
        """Raise: a simulated engine is paused during transfers."""
        raise NotImplementedError("a simulated engine is paused during transfers")

    async def policy_version(self) -> int:
        """Return the version of the weights."""
        self._check()
        return self._versions[-1][1]

    async def score(self, sequences: list[list[int]]) -> list[list[float]]:
        """Raise: there are no tokens."""
        raise NotImplementedError("a simulated engine has no tokens to score")

    async def sampling_error(self, sequences: list[list[int]]) -> float:
        """Raise: there are no tokens."""
        raise NotImplementedError("a simulated engine has no tokens to score")

    async def parameter_checksums(self) -> list[dict[str, str]]:
        """Raise: there are no parameters."""
        raise NotImplementedError("a simulated engine has no parameters")

    async def stacks(self) -> str:
        """Return what it does."""
        return f"decodes {len(self._batch)} sequences; {len(self._waiting)} wait"

    def kill(self) -> None:
        """End the engine."""
        self._die("it was killed")

    def _die(self, why: str) -> None:
        if self._died is not None:
            return
        self._died = why
        for timer in (self._timer, self._death):
            if timer is not None:
                timer.cancel()
        for request in self._requests:
            if not request.done.done():
                request.done.set_exception(EngineLost(why))

    def _check(self) -> None:
        if self._died is not None:
            raise EngineLost(self._died)

    def _catch_up(self) -> None:
        """Decode until now."""
        now = asyncio.get_running_loop().time()
        if not self._paused:
            self._batch.advance(now - self._at)
        self._at = now

    def _go_on(self) -> None:
        """Begin sequences that wait, as far as there is room, and set the timer for the next end."""
        while self._waiting and not self._batch.is_full():
            request, index = self._waiting.popleft()
            request.begun[index] = self._batch.progress
            self._num_sequences += 1
            self._sequences[self._num_sequences] = request
            self._batch.add(self._num_sequences, request.lengths[index])
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if len(self._batch) and not self._paused:
            self._timer = asyncio.get_running_loop().call_later(self._batch.seconds_to_next_end(), self._end_one)

    def _end_one(self) -> None:
        self._at = asyncio.get_running_loop().time()
        self._take(self._batch.pop_next())
        while self._batch.is_one_at_its_end():
            self._take(self._batch.pop_next())
        self._go_on()

    def _take(self, number: int) -> None:
        request = self._sequences.pop(number)
        request.num_left -= 1
        if request.num_left == 0 and not request.done.done():
            request.done.set_result(None)
