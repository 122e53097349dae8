"""Durations and rates of steps, on a clock that the test sets."""

from __future__ import annotations

import pytest

from quatro_ray.telemetry.step_clock import StepClock


def test_a_step_lasts_from_the_record_before_to_its_own() -> None:
    time, seconds = [100.0], {"wait": 7.0}
    clock = StepClock(lambda: time[0], seconds)
    clock.start(1000)
    time[0], seconds["wait"], seconds["train"] = 104.0, 8.0, 2.5
    found = clock.step(num_trained=80, num_rollouts=8, num_generated=1200)
    assert found == {
        "time/step_s": pytest.approx(4.0),
        "time/wait_s": 1.0,
        "time/train_s": 2.5,
        "throughput/trained_tokens_per_s": 20.0,
        "throughput/rollouts_per_s": 2.0,
        "throughput/generated_tokens_per_s": 50.0,
    }
    time[0], seconds["train"] = 105.0, 3.5
    found = clock.step(num_trained=10, num_rollouts=8, num_generated=1200)
    assert found["time/step_s"] == found["time/train_s"] == 1.0
    assert found["throughput/generated_tokens_per_s"] == 0.0
    assert "time/wait_s" not in found
