"""A scorer and its worker processes as a Ray actor."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import ray

from quatro_ray.actors.base import WATCHED, HostMixin
from quatro_ray.config import RewardConfig, VerifierConfig
from quatro_ray.rewards.extract import answer_of
from quatro_ray.rewards.registry import applies, make_remote
from quatro_ray.rewards.scorer import Scorer
from quatro_ray.types import GroupSummary, Outcome, RolloutGroup, Score

if TYPE_CHECKING:
    from quatro_ray.rewards.reward_model_client import RewardModelHandle

_ANSWER_CHARS = 200
_MAX_NOTES = 3


@ray.remote(concurrency_groups=WATCHED)
class VerifierActor(HostMixin):
    """The Ray actor that scores groups.

    Args:
        models: handles of reward-model actors, by the name of their reward.
        sandboxed: names of the rewards that execute responses.
    """

    def __init__(
        self,
        rewards: Mapping[str, RewardConfig],
        config: VerifierConfig,
        models: Mapping[str, Sequence[RewardModelHandle]],
        sandboxed: frozenset[str] = frozenset(),
    ) -> None:
        self._rewards = rewards
        self._config = config
        self._models = models
        self._sandboxed = sandboxed
        self._scorer: Scorer | None = None

    async def start(self) -> None:
        """Start the worker processes; do nothing if they already run."""
        if self._scorer is not None:
            return
        remote = make_remote(self._rewards, self._models)
        scorer = Scorer(self._rewards, self._config, remote, self._sandboxed)
        await scorer.start()
        self._scorer = scorer

    @ray.method(num_returns=2)
    async def score(self, group: RolloutGroup) -> tuple[GroupSummary, RolloutGroup]:
        """Score all rollouts of a group, and return the summary and the group with its scores.

        Raises:
            RewardUnavailable: a response could not be scored through no fault of its own.
        """
        assert self._scorer is not None
        scores = await asyncio.gather(*(self._scorer(group.query, response) for response in group.responses()))
        scored = replace(
            group, rollouts=tuple(replace(r, score=s) for r, s in zip(group.rollouts, scores, strict=True))
        )
        return summarise(self._rewards, scored, scores), scored

    async def shutdown(self) -> None:
        """End the worker processes."""
        if self._scorer:
            await self._scorer.close()


def summarise(rewards: Mapping[str, RewardConfig], group: RolloutGroup, scores: Sequence[Score]) -> GroupSummary:
    """Return the summary of a group whose rollouts have these scores.

    The first of `rewards` that applies to the query decides how a response's answer is extracted and whether it is
    correct.

    Args:
        rewards: the configured rewards, by name.
        group: the group of G rollouts.
        scores: [G], in the order of the rollouts.
    """
    name, deciding = next((n, r) for n, r in rewards.items() if applies(r, group.query))
    answers = [answer_of(r, deciding) for r in group.responses()]
    outcomes = Counter(str(s.outcome) for s in scores)
    return GroupSummary(
        rewards=tuple(s.reward for s in scores),
        reward_values=tuple(dict(s.reward_values) for s in scores),
        outcomes={str(o): outcomes[str(o)] for o in Outcome},
        answers=tuple(None if a is None else a[:_ANSWER_CHARS] for a in answers),
        correct=tuple(s.reward_values.get(name, 0.0) >= 1.0 for s in scores),
        truncated=sum(r.finish_reason == "length" for r in group.rollouts),
        turns=tuple(r.num_turns for r in group.rollouts),
        response_tokens=tuple(r.num_sampled for r in group.rollouts),
        notes=_notes(scores),
    )


def _notes(scores: Sequence[Score]) -> tuple[str, ...]:
    """Return what notes.log tells of the scores, each text once, and at most _MAX_NOTES of them."""
    printed = (f"a reward printed: {score.printed.rstrip()}" for score in scores if score.printed.strip())
    told = (f"{score.outcome}: {score.detail}" for score in scores if score.outcome is not Outcome.OK)
    notes = Counter([*told, *printed])
    lines = [f"{note} ({num} responses)" if num > 1 else note for note, num in notes.most_common(_MAX_NOTES)]
    return (*lines, f"and {len(notes) - _MAX_NOTES} more") if len(notes) > _MAX_NOTES else tuple(lines)
