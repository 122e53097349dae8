"""The retry policy of generation, the same for training and evaluation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ray.exceptions import RayError

from quatro_ray.actors.interfaces import Engine, Generators, GroupRef
from quatro_ray.config import GeneratorConfig
from quatro_ray.errors import last_line
from quatro_ray.failures import EngineLost, GenerationFailed
from quatro_ray.timeouts import within
from quatro_ray.types import DropReason, GenerationSummary, Query, Rollout, SamplingParams


@dataclass(frozen=True)
class GroupRequest:
    """One group to generate: `size` responses to `query`."""

    group_id: int
    query: Query
    sampling: SamplingParams
    size: int


OnRetry = Callable[[GenerationFailed | EngineLost], None]
"""Called before the next attempt, with the failure of the last one."""


async def generate(
    generators: Generators, request: GroupRequest, config: GeneratorConfig, on_retry: OnRetry
) -> tuple[GenerationSummary, GroupRef]:
    """Generate one group, with at most `max_retries` retries and `max_engines_lost` lost engines.

    The group continues from the tokens that a lost engine reported. After any other failure it starts again.

    Returns:
        A summary, and a reference to the group.

    Raises:
        GenerationFailed: the group cannot be generated; carries the reason for dropping it.
    """
    num_failed = num_lost = 0
    begun: tuple[Rollout, ...] = ()
    while True:
        failure: GenerationFailed | EngineLost
        try:
            async with generators.lend() as engine:
                return await generate_once(engine, request, begun, deadline_s=config.group_deadline_s)
        except GenerationFailed as failed:
            num_failed, begun = num_failed + 1, ()
            if num_failed > config.max_retries:
                raise
            failure = failed
        except EngineLost as lost:
            num_lost, begun = num_lost + 1, lost.begun or begun
            if num_lost > config.max_engines_lost:
                detail = f"{num_lost} engines died while generating it; the last: {lost}"
                raise GenerationFailed(DropReason.QUARANTINED, detail) from lost
            failure = lost
        on_retry(failure)


async def generate_once(
    engine: Engine, request: GroupRequest, begun: tuple[Rollout, ...] = (), *, deadline_s: float
) -> tuple[GenerationSummary, GroupRef]:
    """Generate one group on one engine, without a retry.

    Args:
        engine: an engine that `Generators.lend` has lent.
        request: the query, the sampling parameters and the size of the group.
        begun: partial rollouts that another engine reported; the group continues from them.
        deadline_s: limit for the whole group, in seconds.

    Returns:
        A summary, and a reference to the group.

    Raises:
        GenerationFailed: the attempt failed or missed the deadline.
        EngineLost: the engine died.
    """
    work = engine.generate(request.group_id, request.query, request.sampling, request.size, begun)
    try:
        return await within(deadline_s, work)
    except TimeoutError as error:
        detail = f"not generated within generator.group_deadline_s={deadline_s:g} s"
        raise GenerationFailed(DropReason.GENERATOR_ERROR, detail) from error
    except RayError as error:
        raise GenerationFailed(DropReason.GENERATOR_ERROR, last_line(error)) from error
