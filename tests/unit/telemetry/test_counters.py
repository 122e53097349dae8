"""The controller's counters: shares of a step, and what a checkpoint restores."""

from __future__ import annotations

import json

import pytest

from quatro_ray.telemetry.counters import Counters, RewardCounters
from quatro_ray.types import EvaluationResult, GroupSummary


def summary(*values: float, truncated: int = 0, timeouts: int = 0) -> GroupSummary:
    num = len(values)
    return GroupSummary(
        rewards=values,
        reward_values=tuple({"answer": v} for v in values),
        outcomes={"ok": num - timeouts, "timeout": timeouts, "error": 0},
        answers=(None,) * num,
        correct=(False,) * num,
        truncated=truncated,
        turns=(2,) * num,
        response_tokens=(5,) * num,
    )


def test_shares_are_over_all_rollouts_since_the_last_read() -> None:
    counters = RewardCounters()
    counters.add(summary(1.0, 0.0, truncated=1))
    counters.add(summary(1.0, 1.0, timeouts=1))
    assert counters.read() == {
        "reward/part_answer": 0.75,
        "verifier/timeout_share": 0.25,
        "verifier/error_share": 0.0,
        "rollout/truncated_share": 0.25,
        "rollout/turns": 2.0,
    }
    counters.add(summary(0.5))
    assert counters.read()["reward/part_answer"] == 0.5


def test_a_step_without_scored_rollouts_divides_by_nothing() -> None:
    assert RewardCounters().read() == {"rollout/truncated_share": 0.0, "rollout/turns": 0.0}


def counted() -> Counters:
    counters = Counters()
    for skipped, in_flight in ((0.0, 3), (1.0, 0)):
        metrics = {"step/skipped": skipped, "tokens/trained": 10, "off_policy/staleness_tokens": {0: 6, 2: 4}}
        counters.steps.add(metrics, in_flight)
    counters.outcomes.update({"ok": 7})
    counters.evaluations.append(EvaluationResult("set", 1, 1, 4, 8, {1: 0.5, 8: 1.0}, 0.1, 0.5, 3, 0.5, 0.0, 9))
    counters.generated_tokens, counters.steps_lost = 100, 3
    return counters


def test_steps_are_counted() -> None:
    steps = counted().steps
    assert (steps.learner_steps, steps.skipped_steps, steps.weight_updates, steps.in_flight_updates) == (2, 1, 2, 1)
    assert steps.trained_tokens == 20 and steps.staleness_tokens == {0: 12, 2: 8}


def test_a_checkpoint_restores_what_was_counted() -> None:
    """By way of JSON, which turns the keys of dictionaries into text."""
    before, after = counted(), Counters()
    after.restore(json.loads(json.dumps(before.to_dict())))
    assert after == before
    assert after.health() == before.health()


@pytest.mark.parametrize("name", ["groups_continued", "resumed"])
def test_an_older_checkpoint_may_lack_a_count(name: str) -> None:
    values = counted().to_dict()
    del values[name]
    after = Counters()
    after.restore(json.loads(json.dumps(values)))
    assert after.to_dict()[name] == 0
