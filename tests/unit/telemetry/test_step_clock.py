"""Durations and rates of steps, on a clock that the test sets."""

from __future__ import annotations

import pytest

from quatro_ray.telemetry.activity import Activity
from quatro_ray.telemetry.step_clock import StepClock


def test_a_step_lasts_from_the_record_before_to_its_own() -> None:
    time = [100.0]
    learner, engines = Activity(lambda: time[0]), Activity(lambda: time[0])
    learner.enter(0, "wait")
    engines.enter(0, "busy")
    engines.enter(1, "idle")
    roles = {"controller": Activity(lambda: time[0]), "learner": learner, "engines": engines}
    roles["controller"].enter(0, "idle")
    clock = StepClock(lambda: time[0], roles)
    time[0] = 107.0
    clock.start(1000)
    for at, state in ((108.0, "train"), (110.5, "idle"), (111.0, "idle")):
        time[0] = at
        learner.enter(0, state)
    found = clock.step(num_trained=80, num_rollouts=8, num_generated=1200)
    assert found == {
        "time/step_s": pytest.approx(4.0),
        "time/wait_s": 1.0,
        "time/train_s": 2.5,
        "time_share/learner/wait": 0.25,
        "time_share/learner/train": 0.625,
        "time_share/learner/idle": 0.125,
        "time_share/engines/busy": 0.5,
        "time_share/engines/idle": 0.5,
        "throughput/trained_tokens_per_s": 20.0,
        "throughput/rollouts_per_s": 2.0,
        "throughput/generated_tokens_per_s": 50.0,
    }
    learner.enter(0, "train")
    time[0] = 112.0
    found = clock.step(num_trained=10, num_rollouts=8, num_generated=1200)
    assert found["time/step_s"] == found["time/train_s"] == found["time_share/learner/train"] == 1.0
    assert found["throughput/generated_tokens_per_s"] == 0.0
    assert "time/wait_s" not in found


def test_a_role_that_comes_later_counts_from_then_on() -> None:
    time = [0.0]
    roles = {"learner": Activity(lambda: time[0])}
    clock = StepClock(lambda: time[0], roles)
    roles["evaluator"] = Activity(lambda: time[0])
    roles["evaluator"].enter(0, "evaluation")
    time[0] = 1.0
    assert clock.step(num_trained=1, num_rollouts=1, num_generated=1)["time_share/evaluator/evaluation"] == 1.0
