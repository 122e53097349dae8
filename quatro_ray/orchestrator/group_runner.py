"""Takes one group from pending to ready or dropped: generates, scores and filters it, with retries."""

from __future__ import annotations

import logging

from quatro_ray.actors.generation_retry import GroupRequest, generate
from quatro_ray.actors.interfaces import Generators, GroupRef, Replay, Verifiers
from quatro_ray.config import Config
from quatro_ray.errors import StallError
from quatro_ray.failures import EngineLost, GenerationFailed, VerifierFailed
from quatro_ray.orchestrator.exhausted_alarm import ExhaustedAlarm
from quatro_ray.orchestrator.group_filters import why_not
from quatro_ray.seeding import seed_of
from quatro_ray.telemetry.counters import Counters
from quatro_ray.telemetry.recorder import Recorder
from quatro_ray.types import DropReason, GenerationSummary, GroupSummary, Query, SamplingParams


class GroupRunner:
    """Runs groups, and ends the run if too many are dropped in a row."""

    def __init__(
        self,
        config: Config,
        generators: Generators,
        verifiers: Verifiers,
        replay: Replay,
        recorder: Recorder,
        counters: Counters,
    ) -> None:
        self._config = config
        self._generators = generators
        self._verifiers = verifiers
        self._replay = replay
        self._recorder = recorder
        self._counters = counters
        self._exhausted = ExhaustedAlarm()
        self._failures_in_a_row = 0
        self._filtered_in_a_row = 0

    async def run(self, group_id: int, query: Query) -> DropReason | None:
        """Return None when the group is ready, or the reason for which it was dropped.

        Raises:
            StallError: many groups in a row were dropped, so continuing would use up the data for nothing.
        """
        generated = None
        try:
            generated, group = await self._generate(group_id, query)
            summary, scored = await self._verifiers.score(group)
        except (GenerationFailed, VerifierFailed) as failure:
            self._recorder.note(f"group {group_id}: {failure}")
            await self._drop(group_id, failure.reason, generated, None)
            return self._failed(failure.reason)
        self._failures_in_a_row = 0
        for note in summary.notes:
            self._recorder.note(f"group {group_id}: {note}")
        self._counters.scored(summary)
        if alarm := self._exhausted.add(summary.outcomes):
            self._recorder.note(alarm, level=logging.WARNING)
        if reason := why_not(self._config.filters, summary.rewards, summary.truncated):
            await self._drop(group_id, reason, generated, summary)
            return self._filtered_out(reason)
        self._filtered_in_a_row = 0
        await self._replay.ready(scored)
        return None

    async def _generate(self, group_id: int, query: Query) -> tuple[GenerationSummary, GroupRef]:
        def on_retry(failure: GenerationFailed | EngineLost) -> None:
            if isinstance(failure, EngineLost):
                self._counters.requeued(continued=bool(failure.begun))
            else:
                self._recorder.note(f"group {group_id}, again after {failure}")

        request = GroupRequest(group_id, query, self._sampling(group_id), self._config.replay.group_size)
        summary, group = await generate(self._generators, request, self._config.generator, on_retry)
        self._counters.generated(summary)
        return summary, group

    async def _drop(
        self, group_id: int, reason: DropReason, generated: GenerationSummary | None, scored: GroupSummary | None
    ) -> None:
        await self._replay.drop(group_id, reason)
        # counted only now: if this task is cancelled before, the group is pending still, and is made again
        self._counters.dropped(reason, generated, scored, self._config.replay.group_size)

    def _failed(self, reason: DropReason) -> DropReason:
        self._failures_in_a_row += 1
        limit = 4 * self._config.replay.groups_per_step
        if self._failures_in_a_row >= limit:
            raise StallError(
                f"{limit} groups in a row were dropped, the last one for {reason}; see notes.log in run.dir"
            )
        return reason

    def _filtered_out(self, reason: DropReason) -> DropReason:
        self._filtered_in_a_row += 1
        if self._filtered_in_a_row >= (limit := self._config.filters.max_in_a_row):
            raise StallError(
                f"filters.max_in_a_row={limit} groups in a row were filtered out, the last one as {reason}: with these "
                "filters the data has nothing left to train on; loosen the filters, or add other data"
            )
        return reason

    def _sampling(self, group_id: int) -> SamplingParams:
        config = self._config.generator
        seed = seed_of(self._config.run.seed, "train", group_id)
        return SamplingParams(config.temperature, config.top_p, config.max_response_tokens, seed)
