"""Evaluates every held-out set under one policy, on the engines of training or on engines of its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError

from quatro_ray.actors.calls import value_of
from quatro_ray.actors.environment_pool import EnvironmentPool
from quatro_ray.actors.generator_client import GeneratorClient
from quatro_ray.actors.verifier_pool import VerifierPool
from quatro_ray.config import Config
from quatro_ray.errors import StallError, last_line
from quatro_ray.evaluation.engine_pool import FixedPool, PoolLost
from quatro_ray.evaluation.metrics import evaluate
from quatro_ray.evaluation.sampler import Sampler
from quatro_ray.seeding import seed_of
from quatro_ray.telemetry.evaluation_result import EvaluationResult
from quatro_ray.timeouts import within
from quatro_ray.types import Query, SamplingParams

_SHUTDOWN_S = 30


async def evaluate_set(
    config: Config, sampler: Sampler, name: str, queries: Sequence[Query], version: int, step: int
) -> EvaluationResult:
    """Evaluate one held-out set.

    Args:
        config: `evaluation` and, for what it leaves open, `generator` say how responses are sampled.
        sampler: generates and scores.
        name: name of the held-out set.
        queries: its questions.
        version: policy version of the sampler's engines.
        step: optimiser step of that policy.

    Raises:
        StallError: the evaluation missed evaluation.deadline_s.
        ClusterError: a question could not be evaluated.
    """
    settings, generator = config.evaluation, config.generator
    sampling = SamplingParams(
        generator.temperature if settings.temperature is None else settings.temperature,
        generator.top_p if settings.top_p is None else settings.top_p,
        generator.max_response_tokens,
        seed=seed_of(config.run.seed, f"evaluate {name}", 0),
    )
    work = evaluate(
        sampler,
        name,
        queries[: settings.num_queries],
        sampling,
        settings.samples_per_query,
        pass_at=settings.pass_at,
        version=version,
        step=step,
        num_read=settings.rollout_groups,
    )
    try:
        return await within(settings.deadline_s, work)
    except TimeoutError as error:
        raise StallError(f"evaluation of {name} missed evaluation.deadline_s={settings.deadline_s:g} s") from error


class Evaluator:
    """Evaluates a policy on dedicated engines, which start and end with the evaluation, while training continues.

    Args:
        config: `evaluation.num_engines` is the number of engines.
        verifiers: scores the groups.
        spawn: starts an engine actor, given the folder of the model and the engine's index.
        environments: environment pools by the name of the data source whose rollouts are episodes.
    """

    def __init__(
        self,
        config: Config,
        verifiers: VerifierPool,
        spawn: Callable[[str, int], Any],
        environments: Mapping[str, EnvironmentPool],
    ) -> None:
        self._config = config
        self._verifiers = verifiers
        self._spawn = spawn
        self._environments = environments

    async def evaluate(
        self,
        model_path: Path | str,
        version: int,
        step: int,
        held_out: Mapping[str, Sequence[Query]],
        note: Callable[[str], None],
    ) -> list[EvaluationResult]:
        """Evaluate all held-out sets; if an engine is lost, once more with new engines.

        Args:
            model_path: folder of the policy.
            version: its policy version.
            step: its optimiser step.
            held_out: questions by the name of their set.
            note: receives lines for notes.log.

        Raises:
            PoolLost: an engine was lost in the second attempt too.
            StallError: see `evaluate_set`.
            ClusterError: see `evaluate_set`.
        """

        async def once() -> list[EvaluationResult]:
            async with self._sampler(model_path, note) as sampler:
                return [await evaluate_set(self._config, sampler, *item, version, step) for item in held_out.items()]

        try:
            return await once()
        except PoolLost as lost:
            note(f"evaluation of version {version}, again with new engines: {lost}")
            return await once()

    @asynccontextmanager
    async def _sampler(self, model_path: Path | str, note: Callable[[str], None]) -> AsyncIterator[Sampler]:
        """Start engines, and end them after the with block."""
        engines = [self._spawn(str(model_path), i) for i in range(max(1, self._config.evaluation.num_engines))]
        try:
            await self._start(engines)
            clients = [GeneratorClient(e, self._environments) for e in engines]
            pool = FixedPool(clients, self._config.generator.max_groups_in_flight)
            yield Sampler(pool, self._verifiers, self._config.generator, note)
        finally:
            await _end(engines)

    async def _start(self, engines: Sequence[Any]) -> None:
        deadline = self._config.generator.start_deadline_s
        try:
            await within(deadline, asyncio.gather(*(value_of(e.start.remote()) for e in engines)))
        except TimeoutError as error:
            raise PoolLost(f"an evaluation engine did not start within {deadline:g} s") from error
        except RayError as error:
            raise PoolLost(f"an evaluation engine failed: {last_line(error)}") from error


async def _end(engines: Sequence[Any]) -> None:
    for engine in engines:
        with suppress(TimeoutError, GetTimeoutError, RayError):  # the engine is killed in any case
            await within(_SHUTDOWN_S, value_of(engine.shutdown.remote()))
        ray.kill(engine)
