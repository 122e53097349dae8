"""A condition is told once when it has held for ten steps, and again after it ended and came back."""

from __future__ import annotations

import re
from typing import Any

import pytest

from quatro_ray.config import Config
from quatro_ray.config.field_types import sections_in
from quatro_ray.telemetry.step_warnings import NUM_STEPS, StepWarnings

GOOD: dict[str, Any] = {
    "step/uninformative": 0.0,
    "trust_region/frac_active": 0.75,
    "trust_region/frac_void": 0.25,
    "step_control/kept": 1.0,
    "rollout_corr/token_eff_sample_size": 0.9,
    "rollout_corr/eff_sample_size": 0.9,
}
BAD: dict[str, dict[str, Any]] = {
    "step/uninformative": {"step/uninformative": 1.0},
    "trust_region/frac_active": {"trust_region/frac_active": 0.0},
    "step_control/kept": {"step_control/kept": 0.04},
    "rollout_corr/token_eff_sample_size": {"rollout_corr/token_eff_sample_size": 0.04},
    "rollout_corr/eff_sample_size": {"rollout_corr/eff_sample_size": 0.04},
}


def told(*steps: dict[str, Any], response_weights: bool = True) -> list[tuple[int, str]]:
    """The warnings with the number of their step, counted from 1."""
    warnings = StepWarnings(response_weights=response_weights)
    return [(n, text) for n, metrics in enumerate(steps, start=1) for text in warnings.add(GOOD | metrics)]


@pytest.mark.parametrize("name", BAD)
def test_it_is_told_once_and_again_after_it_came_back(name: str) -> None:
    bad = [BAD[name]] * NUM_STEPS
    warnings = told(*bad, *bad, {}, *bad[1:], {}, *bad, *bad)
    assert [n for n, _ in warnings] == [10, 41]
    assert all(name in text for _, text in warnings)


def test_a_good_run_has_no_warning() -> None:
    assert not told(*[GOOD] * 30)


def test_what_was_not_measured_neither_confirms_nor_ends_a_condition() -> None:
    """A step that was not taken has no step control, and a batch without differing rewards no active query."""
    unmeasured = {"step_control/kept": None, "trust_region/frac_active": 0.0, "trust_region/frac_void": 1.0}
    bad = BAD["step_control/kept"] | BAD["trust_region/frac_active"]
    assert [n for n, _ in told(*[unmeasured] * 30)] == []
    assert [n for n, _ in told(*[unmeasured, bad] * NUM_STEPS)] == [20, 20]
    warnings = StepWarnings(response_weights=True)
    assert not [text for _ in range(30) for text in warnings.add({"step/uninformative": 0.0})]


def test_weights_of_whole_responses_matter_only_if_the_objective_has_them() -> None:
    steps = [BAD["rollout_corr/eff_sample_size"]] * NUM_STEPS
    assert told(*steps) and not told(*steps, response_weights=False)


def test_the_fields_that_the_texts_name_exist() -> None:
    every = {name: value for bad in BAD.values() for name, value in bad.items()}
    texts = " ".join(text for _, text in told(*[every] * NUM_STEPS))
    named = set(re.findall(rf"\b(?:{'|'.join(Config.model_fields)})(?:\.[a-z_]+)+", texts)) - {"rollouts.jsonl"}
    assert len(named) >= 8
    for path in named:
        sections = [Config]
        for name in path.split("."):
            fields = [s.model_fields[name] for s in sections if name in s.model_fields]
            assert fields, path
            sections = [inner for f in fields for inner in sections_in(f)]  # type: ignore[misc]
