"""The controller's counters: shares of a step, and what a checkpoint restores."""

from __future__ import annotations

import json

import pytest

from quatro_ray.telemetry.counters import Counters, StepCounters
from quatro_ray.telemetry.evaluation_result import EvaluationResult
from quatro_ray.types import DropReason, GenerationSummary, GroupSummary


def summary(*values: float, timeouts: int = 0) -> GroupSummary:
    num = len(values)
    return GroupSummary(
        rewards=values,
        reward_values=tuple({"answer": v} for v in values),
        outcomes={"ok": num - timeouts, "timeout": timeouts, "error": 0},
        answers=(None,) * num,
        correct=tuple(v >= 1 for v in values),
        truncated=0,
        turns=(2,) * num,
        response_tokens=(5,) * num,
    )


def test_shares_of_outcomes_are_over_all_rollouts_since_the_last_read() -> None:
    counters = Counters()
    counters.scored(summary(1.0, 0.0))
    counters.scored(summary(1.0, 1.0, timeouts=1))
    assert counters.recent.read() == {"verifier/timeout_share": 0.25, "verifier/error_share": 0.0}
    counters.scored(summary(0.5))
    assert counters.recent.read()["verifier/timeout_share"] == 0.0


def test_a_step_without_news_has_no_metric_that_reads_as_zero() -> None:
    assert Counters().recent.read() == {}


def test_drops_tell_length_and_pass_rate_as_far_as_they_are_known() -> None:
    counters = Counters()
    counters.dropped(DropReason.GENERATOR_ERROR, None, None, 2)
    counters.dropped(DropReason.VERIFIER_TIMEOUT, GenerationSummary(300, 0), None, 2)
    for tokens, values in ((10, (1.0, 0.0)), (30, (1.0, 1.0))):
        counters.dropped(DropReason.OVERLONG, GenerationSummary(tokens, 0), summary(*values), 2)
    assert counters.recent.read() == {
        "drops/generator_error": 1,
        "drops/verifier_timeout": 1,
        "drops/verifier_timeout_response_tokens_mean": 150.0,
        "drops/overlong": 2,
        "drops/overlong_response_tokens_mean": 10.0,
        "drops/overlong_pass_rate": 0.75,
    }
    assert counters.recent.read() == {}


def counted() -> Counters:
    counters = Counters()
    for skipped, in_flight in ((0.0, 3), (1.0, 0)):
        metrics = {
            "step/skipped": skipped,
            "step/uninformative": 1 - skipped,
            "tokens/trained": 10,
            "off_policy/staleness_tokens": {0: 6, 2: 4},
        }
        counters.steps.add(metrics, in_flight)
    counters.outcomes.update({"ok": 7})
    counters.evaluations.append(
        EvaluationResult("set", 1, 1, 4, 8, {1: 0.5, 8: 1.0}, 0.5, {"majority": (0.1, 0.9)}, 3, 0.5, 0.0, 9)
    )
    counters.generated_tokens, counters.steps_lost = 100, 3
    return counters


def test_steps_are_counted() -> None:
    steps = counted().steps
    assert (steps.learner_steps, steps.skipped_steps, steps.weight_updates, steps.in_flight_updates) == (2, 1, 2, 1)
    assert steps.uninformative_steps == 1
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


def test_steps_of_an_older_checkpoint_may_lack_a_count() -> None:
    values = json.loads(json.dumps(counted().steps.to_dict()))
    del values["uninformative_steps"]
    after = StepCounters.from_dict(values)
    assert (after.skipped_steps, after.uninformative_steps) == (1, 0)
