"""Scoring with deadlines that hold: a worker that misses one is killed and replaced."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayError

from quatro_ray.actors.clients import value_of
from quatro_ray.config import VerifierConfig
from quatro_ray.errors import last_line
from quatro_ray.types import DropReason, Outcome, Score


class VerifierFailed(Exception):
    """The machinery failed, retries included; the group is to be dropped for `reason`."""

    def __init__(self, reason: DropReason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason


class VerifierPool:
    """Groups are scored whole. One that misses its deadline is scored again rollout by rollout, each alone in
    a fresh worker; a rollout that misses it there too is at fault itself: outcome `exhausted`.

    Args:
        spawn: makes a new worker (an actor handle).
    """

    def __init__(self, spawn: Callable[[], Any], config: VerifierConfig) -> None:
        self._spawn = spawn
        self._config = config
        self._idle: asyncio.Queue[Any] = asyncio.Queue()
        self.workers: list[Any] = []
        self._started: set[Any] = set()
        self.num_replaced = 0
        for _ in range(config.num_workers):
            self._add()

    def _add(self) -> None:
        worker = self._spawn()
        self.workers.append(worker)
        self._idle.put_nowait(worker)

    async def _checkout(self) -> Any:
        """An idle worker that is known to run: a timer that includes its start would blame the answer for it.

        Raises:
            VerifierFailed: it did not start in time; it is replaced.
        """
        worker = await self._idle.get()
        if worker not in self._started:
            try:
                await asyncio.wait_for(value_of(worker.__ray_ready__.remote()), self._config.start_deadline_s)
            except (TimeoutError, RayError) as error:
                self._replace(worker)
                raise VerifierFailed(DropReason.VERIFIER_TIMEOUT, "a worker did not start") from error
            self._started.add(worker)
        return worker

    def _replace(self, worker: Any) -> None:
        ray.kill(worker)
        self.workers.remove(worker)
        self._started.discard(worker)
        self.num_replaced += 1
        self._add()

    async def score(self, group: Any, num_rollouts: int) -> tuple[dict[str, Any], Any]:
        """`group` is a reference; returns the summary of actors/verifier.py and a reference to the scored group.

        Raises:
            VerifierFailed: never a reward that the machinery made up.
        """
        failure = VerifierFailed(DropReason.VERIFIER_ERROR, "never tried")
        for _ in range(1 + self._config.max_retries):
            try:
                return await self._score_whole(group, num_rollouts)
            except VerifierFailed as error:
                failure = error
        raise failure

    async def _score_whole(self, group: Any, num_rollouts: int) -> tuple[dict[str, Any], Any]:
        worker = await self._checkout()
        try:
            summary, scored = worker.score.remote(group)
            result = await asyncio.wait_for(value_of(summary), self._config.deadline_s), scored
        except TimeoutError:
            self._replace(worker)
            return await self._score_one_by_one(group, num_rollouts)
        except RayError as error:
            self._replace(worker)
            raise VerifierFailed(DropReason.VERIFIER_ERROR, last_line(error)) from error
        self._idle.put_nowait(worker)
        return result

    async def _score_one_by_one(self, group: Any, num_rollouts: int) -> tuple[dict[str, Any], Any]:
        scores = [await self._score_alone(group, index) for index in range(num_rollouts)]
        worker = await self._checkout()
        try:
            summary, scored = worker.assemble.remote(group, scores)
            result = await asyncio.wait_for(value_of(summary), self._config.deadline_s), scored
        except TimeoutError as error:
            self._replace(worker)
            raise VerifierFailed(DropReason.VERIFIER_TIMEOUT, "a worker did not answer") from error
        except RayError as error:
            self._replace(worker)
            raise VerifierFailed(DropReason.VERIFIER_ERROR, last_line(error)) from error
        self._idle.put_nowait(worker)
        return result

    async def _score_alone(self, group: Any, index: int) -> Score:
        worker = await self._checkout()
        try:
            score = await asyncio.wait_for(value_of(worker.score_rollout.remote(group, index)), self._config.deadline_s)
        except TimeoutError:
            self._replace(worker)
            return Score(self._config.exhausted_reward, Outcome.EXHAUSTED, "missed its deadline twice")
        except RayError as error:
            self._replace(worker)
            raise VerifierFailed(DropReason.VERIFIER_ERROR, last_line(error)) from error
        self._idle.put_nowait(worker)
        return score
