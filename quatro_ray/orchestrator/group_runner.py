"""One group from pending to ready or dropped: generated, scored, filtered, tried again."""

from __future__ import annotations

from typing import Any

from quatro_ray.config import Config
from quatro_ray.errors import StallError
from quatro_ray.evaluation.sampler import try_generate
from quatro_ray.failures import EngineLost, GenerationFailed, VerifierFailed
from quatro_ray.orchestrator.group_filters import why_not
from quatro_ray.seeding import seed_of
from quatro_ray.telemetry.counters import Counters
from quatro_ray.telemetry.recorder import Recorder
from quatro_ray.types import DropReason, Query, Rollout, SamplingParams


class GroupRunner:
    """
    Args:
        generators, verifiers, replay: as controller.Components has them.
    """

    def __init__(
        self, config: Config, generators: Any, verifiers: Any, replay: Any, recorder: Recorder, tally: Counters
    ) -> None:
        self._config = config
        self._generators = generators
        self._verifiers = verifiers
        self._replay = replay
        self._recorder = recorder
        self._tally = tally
        self._failures_in_a_row = 0
        self._filtered_in_a_row = 0

    async def make(self, group_id: int, query: Query) -> DropReason | None:
        """Returns when the group is ready (None) or dropped, and why.

        Raises:
            StallError: a long row of drops; going on would burn all data.
        """
        try:
            group = await self._generate(group_id, query)
            summary, scored = await self._verifiers.score(group)
        except (GenerationFailed, VerifierFailed) as failure:
            self._recorder.note(f"group {group_id}: {failure}")
            return await self._drop(group_id, failure.reason)
        self._failures_in_a_row = 0
        self._tally.outcomes.update(summary["outcomes"])
        self._tally.rewards.add(summary)
        if reason := why_not(self._config.filters, summary["rewards"], summary["truncated"]):
            return await self._filter_out(group_id, reason)
        self._filtered_in_a_row = 0
        await self._replay.ready(scored)
        return None

    async def _generate(self, group_id: int, query: Query) -> Any:
        """A reference to the group. Raises GenerationFailed after the last try."""
        num_failed = num_lost = 0
        begun: tuple[Rollout, ...] = ()
        while True:
            try:
                async with self._generators.slot() as generator:
                    await self._replay.start(group_id)
                    sampling, size = self._sampling(group_id), self._config.replay.group_size
                    deadline = self._config.generator.group_deadline_s
                    summary, group = await try_generate(
                        generator, group_id, query, sampling, size, begun, deadline_s=deadline
                    )
            except GenerationFailed as failure:
                num_failed, begun = num_failed + 1, ()
                if num_failed > self._config.generator.max_retries:
                    raise
                self._recorder.note(f"group {group_id}, again after {failure}")
            except EngineLost as lost:
                num_lost += 1
                self._tally.groups_requeued += 1
                if lost.begun:
                    self._tally.groups_continued += 1
                    begun = lost.begun
                if num_lost > self._config.generator.max_engines_lost:
                    detail = f"{num_lost} engines died over it, the last one: {lost}"
                    raise GenerationFailed(DropReason.QUARANTINED, detail) from lost
            else:
                self._tally.generated_tokens += summary["num_tokens"]
                self._tally.multi_version_rollouts += summary["multi_version_rollouts"]
                await self._replay.generated(group_id)
                return group
            await self._replay.retry(group_id)

    async def _drop(self, group_id: int, reason: DropReason) -> DropReason:
        await self._replay.drop(group_id, reason)
        self._failures_in_a_row += 1
        limit = 4 * self._config.replay.groups_per_step
        if self._failures_in_a_row >= limit:
            raise StallError(
                f"{limit} groups in a row were dropped, the last one for {reason}; see notes.log in the run"
            )
        return reason

    async def _filter_out(self, group_id: int, reason: DropReason) -> DropReason:
        await self._replay.drop(group_id, reason)
        self._filtered_in_a_row += 1
        if self._filtered_in_a_row >= (limit := self._config.filters.max_in_a_row):
            raise StallError(
                f"filters.max_in_a_row={limit} groups in a row were filtered out, the last one as {reason}: nothing "
                "is left to learn from this data under these filters; loosen them, or mix in other data"
            )
        return reason

    def _sampling(self, group_id: int) -> SamplingParams:
        config = self._config.generator
        seed = seed_of(self._config.run.seed, "train", group_id)
        return SamplingParams(config.temperature, config.top_p, config.max_response_tokens, seed)
