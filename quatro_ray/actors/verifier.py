"""A verifier process as a Ray actor."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import ray

from quatro_ray.actors.host import HostMixin
from quatro_ray.tasks.registry import make_verifier
from quatro_ray.types import Outcome, RolloutGroup, Score


@ray.remote
class VerifierActor(HostMixin):
    """Scores in its only thread; whoever calls it holds the deadline, and kills it when that passes."""

    def __init__(self, verifier: str) -> None:
        self._verify = make_verifier(verifier)

    @ray.method(num_returns=2)
    def score(self, group: RolloutGroup) -> tuple[dict[str, Any], RolloutGroup]:
        """The summary of the scores, and the group with them."""
        return summarise(group, [self._verify(group.query, r.text) for r in group.rollouts])

    def score_rollout(self, group: RolloutGroup, index: int) -> Score:
        return self._verify(group.query, group.rollouts[index].text)

    @ray.method(num_returns=2)
    def assemble(self, group: RolloutGroup, scores: list[Score]) -> tuple[dict[str, Any], RolloutGroup]:
        """Puts together what was scored one by one."""
        return summarise(group, scores)


def summarise(group: RolloutGroup, scores: list[Score]) -> tuple[dict[str, Any], RolloutGroup]:
    """`outcomes` by name, `rewards` and `texts` of the rollouts; and the group with its scores."""
    rollouts = tuple(replace(r, score=s) for r, s in zip(group.rollouts, scores, strict=True))
    outcomes = Counter(str(s.outcome) for s in scores)
    summary = {
        "outcomes": {str(o): outcomes[str(o)] for o in Outcome},
        "rewards": [s.reward for s in scores],
        "response_tokens": [r.num_tokens for r in rollouts],
        "truncated": sum(r.finish_reason == "length" for r in rollouts),
    }
    return summary, replace(group, rollouts=rollouts)
