"""A short run of benchmarks/chaos.py: real faults of four kinds, and the books add up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.chaos import run_chaos

pytestmark = pytest.mark.slow
KINDS = ["engine core killed", "learner rank killed", "replay killed", "verifier worker stopped"]
SMALL = ["run.num_steps=160", "replay.groups_per_step=8", "replay.group_size=8", "evaluation.num_queries=16"]


def test_nothing_is_lost_under_real_faults(warm_model_path: str, tmp_path: Path) -> None:
    # in place of a run without faults: what it would have told of itself
    calm = tmp_path / "baseline.json"
    calm.write_text(json.dumps({"pass_at_1": 0.0, "checkpoint_bytes": 2_000_000, "model": warm_model_path}))
    result = run_chaos(
        tmp_path / "work", KINDS, max_faults=len(KINDS), minutes=10, seed=1, overrides=SMALL, baseline=calm
    )
    assert not result.failures(), json.dumps(result.record(), indent=1)
    assert {o.kind for o in result.outcomes} == set(KINDS)
