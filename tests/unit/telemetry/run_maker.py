"""Run directories for tests of the report, written by the recorder itself."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

from quatro_ray.replay.batch_metrics import batch_metrics
from quatro_ray.replay.serialization import readable
from quatro_ray.telemetry.console import Progress
from quatro_ray.telemetry.evaluation_result import EvaluationResult
from quatro_ray.telemetry.recorder import Recorder
from quatro_ray.types import EngineLoad, Query, RolloutGroup, Score, StepMetrics
from tests.make import group, rollout

LONG_NAME = "questions_of_the_third_grade_with_a_very_long_name_indeed"


def make_group(rng: random.Random, group_id: int, source: str, share: float, text: str) -> RolloutGroup:
    """Four responses, of which about `share` are correct."""
    rollouts = []
    for _ in range(4):
        value = float(rng.random() < share)
        score = Score(value + 0.1, reward_values={"answer": value, "form": 1.0})
        made = replace(rollout(rng.randint(20, 400)), score=score, text=text)
        rollouts.append(replace(made, finish_reason="length" if made.num_tokens > 350 else "stop"))
    unnamed = group(group_id, *rollouts, prompt_tokens=rng.randint(5, 60))
    return replace(unnamed, query=Query(f"q{group_id}", "What is 3 + 4?\nThink first.", "7", source=source))


def step_metrics(rng: random.Random, step: int, groups: list[RolloutGroup]) -> StepMetrics:
    """Metrics of all kinds, as a run of QUATRO with filters has them."""
    metrics: StepMetrics = {
        "reward/mean": sum(float(g.rewards().mean()) for g in groups) / len(groups),
        "reward/frac_zero_std": 0.25,
        "policy/entropy": 1.0 + 1 / step,
        "policy/realised_kl_nats": [0.01, 0.02 * step],
        "policy_gradient/limited_share": 0.05,
        "trust_region/target_log_ratio": [rng.gauss(0, 1) for _ in range(16)],
        "trust_region/eta": [1.0 + rng.random()],
        "trust_region/frac_active": 0.75,
        "trust_region/frac_slack": 0.25,
        "trust_region/frac_void": 0.0,
        "step_control/share_of_budget": 0.8,
        "step_control/kept": 1.0,
        "rollout_corr/eff_sample_size": 0.9,
        "rollout_corr/token_eff_sample_size": 0.95,
        "rollout_corr/log_ratio_tokens": [1.0, 5.0, 40.0, 5.0, 1.0],
        "weight_sync/logprob_abs_diff": 1e-6 * (1 + rng.random()),
        "off_policy/staleness_mean": 1.0,
        "off_policy/staleness_max": 2.0,
        "off_policy/staleness_tokens": {0: 500, 1: 900, 2: 400},
        "tokens/trained": sum(g.num_tokens for g in groups),
        "step/skipped": 0.0,
        "step/uninformative": 0.0,
        "step/grad_norm": 0.5,
        "step/learning_rate": 1e-5 * min(1.0, step / 5),
        "time/step_s": 2.5,
        "time/wait_s": 0.5,
        "time/train_s": 1.5,
        "time/sync_s": 0.3,
        "time/weight_sync_pause_s": 0.1,
        "time/weight_sync_transfer_s": 0.2,
        "throughput/trained_tokens_per_s": 2000.0,
        "throughput/generated_tokens_per_s": 2400.0,
        "time_share/learner/wait": 0.2,
        "time_share/learner/train": 0.6,
        "time_share/learner/sync": 0.12,
        "time_share/learner/idle": 0.08,
        "time_share/generators/busy": 0.9,
        "time_share/generators/idle": 0.1,
        "throughput/rollouts_per_s": 6.4,
        **batch_metrics(groups),
    }
    if step % 3 == 0:
        metrics |= {"drops/overlong": 2, "drops/overlong_response_tokens_mean": 380.0, "drops/overlong_pass_rate": 0.1}
        metrics |= {"drops/generator_error": 1}
    return metrics


def write_run(path: Path, num_steps: int = 2, response: str = "7", *, finished: bool = True) -> Path:
    """Write a run of `num_steps` steps; one that is not finished has no summary."""
    path.mkdir()
    rng = random.Random(0)
    recorder = Recorder(path, num_steps=num_steps, progress=Progress())
    for step in (0, num_steps):
        rates = {1: 0.25 + 0.02 * step, 8: 0.5 + 0.02 * step}
        recorder.evaluation(EvaluationResult("sums", step, step, 4, 8, rates, 0.5, {}, 3, 0.4, 0.0, 64))
    for step in range(1, num_steps + 1):
        with recorder.phase("learner", "train"):
            recorder.engine_load(0, EngineLoad(3 + step % 2, 10, 12, is_alive=True))
        share = 1 - math.exp(-step / 8)
        groups = [make_group(rng, 4 * step + i, ("sums", LONG_NAME)[i % 2], share, response) for i in range(4)]
        recorder.step(step, step_metrics(rng, step, groups), [readable(groups[0])])
    recorder.note("ended by ClusterError: an engine was lost" if not finished else "done")
    recorder.close()
    if finished:
        summary: dict[str, Any] = {
            "pass_at_1_end": 0.123456,
            "evaluations": {"sums": {"pass_at_1": 0.5, "num_queries": 4}},
            "learner_steps": num_steps,
            "trained_tokens": 1234567,
            "staleness_tokens": {"0": 10, "2": 5},
            "drops": {"stale": 3},
            "peak_rss_bytes": {"controller": 3 * 2**29, "engines": 2**31},
        }
        (path / "summary.json").write_text(json.dumps(summary))
    (path / "config.yaml").write_text(f"run:\n  dir: <here>\n  num_steps: {2 * num_steps}\n")
    return path
