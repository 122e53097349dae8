"""What Prometheus gets for a run, without Ray and Prometheus."""

from __future__ import annotations

import math
import random
import re
from pathlib import Path

import pytest

from quatro_ray.telemetry.console import Progress
from quatro_ray.telemetry.evaluation_result import EvaluationResult
from quatro_ray.telemetry.prometheus_names import FAMILIES, MAX_STALENESS, Series, numbers, series_of
from quatro_ray.telemetry.recorder import Recorder
from quatro_ray.telemetry.run_gauges import RunGauges
from quatro_ray.types import DropReason, Outcome, StepMetrics
from tests.unit.telemetry.run_maker import make_group, step_metrics

DOC = Path(__file__).parents[3] / "docs/monitoring.md"


@pytest.fixture
def gauges() -> RunGauges:
    return RunGauges({MAX_STALENESS: 4}, clock=lambda: 1000.0)


@pytest.mark.parametrize(
    ("metric", "name", "labels"),
    [
        ("reward/mean", "quatro_reward_mean", ()),
        ("reward/part_answer", "quatro_reward_part_mean", ("answer",)),
        ("reward/source_gsm8k/main v2", "quatro_source_reward_mean", ("gsm8k/main v2",)),
        ("time_share/generators/wait_weights", "quatro_time_share", ("generators", "wait_weights")),
        ("drops/zero_variance", "quatro_drops_total", ("zero_variance",)),
        ("verifier/exhausted_share", "quatro_verifier_outcome_share", ("exhausted",)),
        ("trust_region/frac_active", "quatro_trust_region_share", ("active",)),
        ("health/engines", "quatro_engines", ()),
        ("health/engines_lost", "quatro_losses_total", ("engines_lost",)),
        ("eval/my set/pass_at_8", "quatro_evaluation_pass_at", ("my set", "8")),
    ],
)
def test_a_metric_has_a_series(metric: str, name: str, labels: tuple[str, ...]) -> None:
    assert series_of(metric) == Series(name, labels)


@pytest.mark.parametrize(
    "metric",
    ["drops/stale_pass_rate", "drops/stale_response_tokens_mean", "eval/sums/pass_at_1_interval", "reward/std", "step"],
)
def test_other_metrics_have_none(metric: str) -> None:
    assert series_of(metric) is None


def test_every_reason_and_outcome_has_a_series() -> None:
    assert all(series_of(f"drops/{reason}") for reason in DropReason)
    assert all(series_of(f"verifier/{outcome}_share") for outcome in Outcome)


def test_numbers_are_finite_or_means_of_queries() -> None:
    metrics: StepMetrics = {"a": 1, "b": math.nan, "c": None, "d": [0.5, 1.5], "e": [], "f": {0: 5}}
    assert dict(numbers(metrics)) == {"a": 1.0, "d": 1.0}


def test_names_are_valid_and_unique() -> None:
    names = [family.name for family in FAMILIES]
    assert len(set(names)) == len(names)
    for family in FAMILIES:
        assert re.fullmatch(r"quatro_[a-z_]+", family.name) and len(set(family.labels)) == len(family.labels)
        assert all(re.fullmatch(r"[a-z]+", label) and label != "run" for label in family.labels)
        assert family.is_added <= family.name.endswith("_total")


def test_a_step_replaces_values_and_adds_to_counts(gauges: RunGauges) -> None:
    gauges.on_step(1, {"reward/mean": 0.25, "policy/entropy": 2.0, "drops/stale": 2, "tokens/trained": 10})
    gauges.on_step(2, {"reward/mean": 0.5, "drops/stale": 1, "tokens/trained": 5})
    values = gauges.values()
    assert values[Series("quatro_step")] == 2
    assert values[Series("quatro_reward_mean")] == 0.5
    assert Series("quatro_entropy_nats") not in values  # the last step has none
    assert values[Series("quatro_drops_total", ("stale",))] == 3
    assert values[Series("quatro_trained_tokens_total")] == 15
    assert values[Series("quatro_last_step_timestamp_seconds")] == 1000
    assert values[Series("quatro_max_staleness")] == 4


def test_counts_are_there_before_anything_happened(gauges: RunGauges) -> None:
    """Otherwise increase() would not see the first loss."""
    before = gauges.values()
    assert all(before[Series("quatro_drops_total", (reason,))] == 0 for reason in DropReason)
    assert before[Series("quatro_events_total", ("lost", "generator"))] == 0
    for part in ("generator 3", "generator 7", "metrics.jsonl", "learner"):
        gauges.on_event("lost", part)
    values = gauges.values()
    counts = {part: values[Series("quatro_events_total", ("lost", part))] for part in ("generator", "learner", "other")}
    assert counts == {"generator": 2, "learner": 1, "other": 1}


def test_a_fall_back_returns_to_its_step(gauges: RunGauges) -> None:
    gauges.on_step(9, {"drops/stale": 1})
    gauges.on_rewind(4)
    assert gauges.values()[Series("quatro_step")] == 4
    assert gauges.values()[Series("quatro_drops_total", ("stale",))] == 1


def test_the_recorder_passes_on_what_it_records(gauges: RunGauges, tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, num_steps=9, progress=Progress())
    recorder.follow_with(gauges)
    recorder.listen(gauges.on_event)
    rng = random.Random(0)
    metrics = step_metrics(rng, 3, [make_group(rng, i, "sums", 0.5, "7") for i in range(4)])
    recorder.step(3, metrics, [])
    recorder.event("lost", "generator 0", why="it died")
    rates, intervals = {1: 0.25, 8: 0.5}, {"pass_at_1": (0.0, 1.0)}
    recorder.evaluation(EvaluationResult("sums", 3, 3, 4, 8, rates, 0.5, intervals, 3, 0.4, 0.0, 64))
    values = gauges.values()
    assert values[Series("quatro_groups_total", ("sums",))] == 4
    assert values[Series("quatro_events_total", ("lost", "generator"))] == 1
    assert values[Series("quatro_evaluation_pass_at", ("sums", "8"))] == 0.5
    recorder.rewind(2, {0})
    assert gauges.values()[Series("quatro_step")] == 2
    recorder.close()


def test_the_documentation_has_every_name() -> None:
    """If it fails: replace the table in docs/monitoring.md by `expected`."""
    rows = []
    for family in FAMILIES:
        labels = f"{{{','.join(family.labels)}}}" if family.labels else ""
        rows.append(f"| `ray_{family.name}{labels}` | `{family.source}` | {family.text} |")
    expected = "\n".join(rows)
    assert expected == "\n".join(line for line in DOC.read_text().splitlines() if line.startswith("| `ray_quatro_"))
