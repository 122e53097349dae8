"""A judge and its worker processes as a Ray actor."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import ray

from quatro_ray.actors.base import WATCHED, HostMixin
from quatro_ray.config import Extraction, RewardConfig, VerifierConfig
from quatro_ray.rewards.extract import extract
from quatro_ray.rewards.registry import applies, make_remote
from quatro_ray.rewards.scorer import Scorer
from quatro_ray.types import Outcome, RolloutGroup, Score


@ray.remote(concurrency_groups=WATCHED)
class VerifierActor(HostMixin):
    """`models`: handles of reward-model actors, by the name of their part; `sandboxed`: parts that execute text."""

    def __init__(
        self,
        rewards: Mapping[str, RewardConfig],
        config: VerifierConfig,
        models: Mapping[str, list[Any]],
        sandboxed: frozenset[str] = frozenset(),
    ) -> None:
        self._rewards = rewards
        self._config = config
        self._models = models
        self._sandboxed = sandboxed
        self._judge: Scorer | None = None

    async def start(self) -> None:
        """Starts nothing again when it already runs."""
        if self._judge is not None:
            return
        remote = make_remote(self._rewards, self._models)
        judge = Scorer(self._rewards, self._config, remote, self._sandboxed)
        await judge.start()
        self._judge = judge

    @ray.method(num_returns=2)
    async def score(self, group: RolloutGroup) -> tuple[dict[str, Any], RolloutGroup]:
        """The summary of the scores, and the group with them."""
        assert self._judge is not None
        scores = await asyncio.gather(*(self._judge(group.query, r.response) for r in group.rollouts))
        summary, scored = summarise(group, scores)
        answers, correct = answers_of(self._rewards, scored)
        return summary | {"answers": answers, "correct": correct}, scored

    async def shutdown(self) -> None:
        if self._judge:
            await self._judge.close()


def summarise(group: RolloutGroup, scores: list[Score]) -> tuple[dict[str, Any], RolloutGroup]:
    """`outcomes` by name, `rewards` and their `parts` of the rollouts, …; and the group with its scores."""
    rollouts = tuple(replace(r, score=s) for r, s in zip(group.rollouts, scores, strict=True))
    outcomes = Counter(str(s.outcome) for s in scores)
    summary = {
        "outcomes": {str(o): outcomes[str(o)] for o in Outcome},
        "rewards": [s.reward for s in scores],
        "parts": [dict(s.parts) for s in scores],
        "response_tokens": [r.num_sampled for r in rollouts],
        "turns": [r.num_turns for r in rollouts],
        "truncated": sum(r.finish_reason == "length" for r in rollouts),
    }
    return summary, replace(group, rollouts=rollouts)


def answers_of(rewards: Mapping[str, RewardConfig], group: RolloutGroup) -> tuple[list[str | None], list[bool]]:
    """Of each rollout: the text of its answer (cut to 200 characters), and whether the part that says so, the first of
    `rewards` that applies to the query, gave it 1 or more."""
    name, part = next((n, p) for n, p in rewards.items() if applies(p, group.query))
    where: Extraction = getattr(part, "extract", "whole")
    answers = [extract(r.text, where) for r in group.rollouts]
    correct = [r.score is not None and r.score.parts.get(name, 0.0) >= 1.0 for r in group.rollouts]
    return [None if a is None else a[:200] for a in answers], correct
