"""Short runs of benchmarks/chaos.py: real faults, and the books add up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import chaos

SMALL = ["replay.groups_per_step=8", "replay.group_size=8", "evaluation.num_queries=16"]


def check_nothing_is_lost(model: str, folder: Path, kinds: list[str], num_steps: int) -> None:
    """Under one fault of each kind."""
    # in place of a run without faults: what it would have told of itself
    calm = folder / "baseline.json"
    calm.write_text(json.dumps({"pass_at_1": 0.0, "checkpoint_bytes": 2_000_000, "model": model}))
    overrides = [f"run.num_steps={num_steps}", *SMALL]
    result = chaos.run_chaos(
        folder / "work", kinds, max_faults=len(kinds), minutes=10, seed=1, overrides=overrides, baseline=calm
    )
    assert not result.failures(), json.dumps(result.record(), indent=1)
    assert {o.kind for o in result.outcomes} == set(kinds)


def test_nothing_is_lost_when_a_learner_and_the_replay_die(
    warm_model_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chaos, "_CALM_END_STEPS", 10)  # of steps after the last fault; they are for its accuracy
    check_nothing_is_lost(warm_model_path, tmp_path, ["learner rank killed", "replay killed"], num_steps=40)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_nothing_is_lost_under_real_faults(warm_model_path: str, tmp_path: Path) -> None:
    kinds = ["engine core killed", "learner rank killed", "replay killed", "verifier worker stopped"]
    check_nothing_is_lost(warm_model_path, tmp_path, kinds, num_steps=160)
