"""One group generated and scored, outside of the ledger: what evaluation needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ray.exceptions import RayError

from quatro_ray.actors.verifier_pool import VerifierPool
from quatro_ray.config import GeneratorConfig
from quatro_ray.errors import ClusterError, last_line
from quatro_ray.failures import EngineLost, GenerationFailed, VerifierFailed
from quatro_ray.replay.serialization import readable
from quatro_ray.timeouts import within
from quatro_ray.types import DropReason, GenerationSummary, GroupSummary, Query, Rollout, SamplingParams


async def try_generate(
    generator: Any,
    group_id: int,
    query: Query,
    sampling: SamplingParams,
    size: int,
    begun: tuple[Rollout, ...] = (),
    *,
    deadline_s: float,
) -> tuple[GenerationSummary, Any]:
    """A summary, and a reference to the group.

    Raises:
        GenerationFailed: this try failed.
        EngineLost: the engine itself is gone.
    """
    try:
        return await within(deadline_s, generator.generate(group_id, query, sampling, size, begun))
    except TimeoutError as error:
        detail = f"not generated within group_deadline_s={deadline_s:g} s"
        raise GenerationFailed(DropReason.GENERATOR_ERROR, detail) from error
    except RayError as error:
        raise GenerationFailed(DropReason.GENERATOR_ERROR, last_line(error)) from error


class Sampler:
    """
    Args:
        generators: a Fleet or a FixedPool of actors/fleet.py.
        note: takes a line for the run's notes.
    """

    def __init__(
        self,
        generators: Any,
        verifiers: VerifierPool,
        config: GeneratorConfig,
        note: Callable[[str], None],
    ) -> None:
        self._generators = generators
        self._verifiers = verifiers
        self._config = config
        self._note = note

    async def sample(
        self, group_id: int, query: Query, sampling: SamplingParams, size: int, *, read: bool
    ) -> tuple[GroupSummary, dict[str, Any] | None]:
        """Return the verifier's summary and, if `read`, the group in the form of rollouts.jsonl.

        Raises:
            ClusterError: it failed, retries included; a pass rate over the rest would be biased.
        """
        group = await self._generate(group_id, query, sampling, size)
        try:
            summary, scored = await self._verifiers.score(group)
        except VerifierFailed as failure:
            raise ClusterError(f"evaluation: question {query.query_id!r} could not be scored: {failure}") from failure
        return summary, readable(await scored) if read else None

    async def _generate(self, group_id: int, query: Query, sampling: SamplingParams, size: int) -> Any:
        num_failed = num_lost = 0
        while num_failed <= self._config.max_retries and num_lost <= self._config.max_engines_lost:
            try:
                async with self._generators.lend() as generator:
                    deadline = self._config.group_deadline_s
                    _, group = await try_generate(generator, group_id, query, sampling, size, deadline_s=deadline)
                    return group
            except GenerationFailed as failure:
                num_failed += 1
                self._note(f"question {query.query_id!r}: {failure}")
            except EngineLost as lost:
                num_lost += 1
                self._note(f"question {query.query_id!r}: {lost}")
        raise ClusterError(f"evaluation: question {query.query_id!r} could not be generated; see notes.log in the run")
