"""Generates and scores one group outside the ledger, which is what evaluation needs."""

from __future__ import annotations

from collections.abc import Callable

from quatro_ray.actors.generation_retry import GroupRequest, generate
from quatro_ray.actors.interfaces import Generators, GroupRef, Verifiers
from quatro_ray.config import GeneratorConfig
from quatro_ray.errors import ClusterError
from quatro_ray.failures import EngineLost, GenerationFailed, VerifierFailed
from quatro_ray.replay.serialization import readable
from quatro_ray.types import GroupSummary, Query, SamplingParams


class Sampler:
    """Generates and scores groups on the engines of training or on those of one evaluation.

    Args:
        note: receives a line for notes.log.
    """

    def __init__(
        self,
        generators: Generators,
        verifiers: Verifiers,
        config: GeneratorConfig,
        note: Callable[[str], None],
    ) -> None:
        self._generators = generators
        self._verifiers = verifiers
        self._config = config
        self._note = note

    async def sample(
        self, group_id: int, query: Query, sampling: SamplingParams, size: int, *, read: bool
    ) -> tuple[GroupSummary, dict[str, object] | None]:
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

    async def _generate(self, group_id: int, query: Query, sampling: SamplingParams, size: int) -> GroupRef:
        def on_retry(failure: GenerationFailed | EngineLost) -> None:
            self._note(f"question {query.query_id!r}: {failure}")

        request = GroupRequest(group_id, query, sampling, size)
        try:
            _, group = await generate(self._generators, request, self._config, on_retry)
        except GenerationFailed as failure:
            self._note(f"question {query.query_id!r}: {failure}")
            raise ClusterError(
                f"evaluation: question {query.query_id!r} could not be generated: {failure}; see notes.log in the run"
            ) from failure
        return group
