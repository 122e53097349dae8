"""Each alert fires for the run it is made for, alone, and none fires for a healthy run (promtool)."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from quatro_ray.telemetry.prometheus_names import FAMILIES
from tests.prometheus import needs_prometheus

pytestmark = [pytest.mark.process, needs_prometheus]

RULES = Path(__file__).parents[2] / "deploy/prometheus/alerts.yaml"
ALERTS = {rule["alert"] for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]}
MINUTES = 120
HEALTHY = {
    "step": "0+1x120",
    "num_steps": "1000+0x120",
    "last_step_timestamp_seconds": "0+60x120",
    "engines": "4+0x120",
    "num_engines": "4+0x120",
    "staleness_mean": "1.9+0x120",  # as in a run whose engines are a little faster than its learner
    "max_staleness": "2+0x120",
    "step_control_kept": "1+0x120",
    'time_share{role="learner",state="wait"}': "0.1+0x120",
    'time_share{role="learner",state="idle"}': "0.1+0x120",
    'time_share{role="generators",state="idle"}': "0.2+0x120",
    'trust_region_share{status="active"}': "0.5+0x120",
    'trust_region_share{status="slack"}': "0.1+0x120",
    'groups_total{source="sums"}': "0+8x120",
    'drops_total{reason="stale"}': "0+0x120",
    'drops_total{reason="zero_variance"}': "0+1x120",
    'drops_total{reason="verifier_error"}': "0+0x120",
    'drops_total{reason="run_ended"}': "0+0x120",
    'verifier_outcome_share{outcome="exhausted"}': "0+0x120",
    'events_total{event="lost",part="generator"}': "0+0x120",
    'events_total{event="lost",part="learner"}': "0+0x120",
}
ENDED = {name: f"{values.split('x')[0]}x60 stale" for name, values in HEALTHY.items()}
ONE_AT_100 = "0+0x99 1+0x20"
ONE_AT_20 = "0+0x19 1+0x100"
CASES: dict[str, tuple[str | None, dict[str, str]]] = {
    "healthy": (None, {}),
    "no step": ("QuatroNoStep", {"last_step_timestamp_seconds": "0+60x80 4800+0x40"}),
    "ended early": ("QuatroRunEndedEarly", ENDED),
    "ended": (None, ENDED | {"num_steps": "60+0x60 stale"}),
    "an engine lost": ("QuatroEngineLost", {'events_total{event="lost",part="generator"}': ONE_AT_100}),
    "an engine lost long ago": (None, {'events_total{event="lost",part="generator"}': ONE_AT_20}),
    "an engine missing": ("QuatroEnginesMissing", {"engines": "4+0x80 3+0x40"}),
    "an engine missing for a moment": (None, {"engines": "4+0x110 3+0x10"}),
    "learner lost": ("QuatroLearnerLost", {'events_total{event="lost",part="learner"}': ONE_AT_100}),
    "learner idle": ("QuatroLearnerIdle", {'time_share{role="learner",state="wait"}': "0.45+0x120"}),
    "engines idle": ("QuatroEnginesIdle", {'time_share{role="generators",state="idle"}': "0.6+0x120"}),
    "few kept": ("QuatroFewGroupsKept", {'drops_total{reason="zero_variance"}': "0+9x120"}),
    "the end of a run": (None, {'drops_total{reason="run_ended"}': "0+9x120"}),
    "stale": ("QuatroStaleGroups", {'drops_total{reason="stale"}': "0+1x120"}),
    "stale below the maximum": (None, {'drops_total{reason="stale"}': "0+1x120", "staleness_mean": "1+0x120"}),
    "synchronous": (
        None,
        {"max_staleness": "0+0x120", "staleness_mean": "0+0x120", 'drops_total{reason="stale"}': "0+1x120"},
    ),
    "no query at its budget": (
        "QuatroTrustRegionInactive",
        {'trust_region_share{status="active"}': "0.001+0x120", 'trust_region_share{status="slack"}': "0.9+0x120"},
    ),
    "all rewards equal": (
        None,
        {'trust_region_share{status="active"}': "0+0x120", 'trust_region_share{status="slack"}': "0+0x120"},
    ),
    "short steps": ("QuatroStepControlKeepsLittle", {"step_control_kept": "0.01+0x120"}),
    "failing": ("QuatroGroupsFail", {'drops_total{reason="verifier_error"}': "0+1x120"}),
    "exhausted": ("QuatroResponsesExhausted", {'verifier_outcome_share{outcome="exhausted"}': "0.3+0x120"}),
}


def series(name: str) -> str:
    """Return the full name, with the label `run`."""
    family, _, labels = name.partition("{")
    return f'ray_quatro_{family}{{run="r"{"," if labels else ""}{labels or "}"}'


def case(name: str, alert: str | None, values: dict[str, str]) -> dict[str, Any]:
    firing = [{"labels": f'{{alertname="{alert}"}}', "value": 1}] if alert else []
    return {
        "name": name,
        "interval": "1m",
        "input_series": [{"series": series(n), "values": v} for n, v in (HEALTHY | values).items()],
        "promql_expr_test": [
            {
                "expr": 'count by (alertname) (ALERTS{alertstate="firing"})',
                "eval_time": "75m" if "stale" in values.get("step", "") else f"{MINUTES - 1}m",
                "exp_samples": firing,
            }
        ],
    }


def promtool(*args: str) -> None:
    done = subprocess.run(["promtool", *args], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_rules_and_example_are_valid() -> None:
    promtool("check", "rules", str(RULES))
    promtool("check", "config", str(RULES.parent / "prometheus.yaml"))


def test_each_alert_fires_for_its_own_case(tmp_path: Path) -> None:
    assert {alert for alert, _ in CASES.values()} == {*ALERTS, None}
    tests = [case(name, *values) for name, values in CASES.items()]
    path = tmp_path / "alerts_test.yaml"
    path.write_text(json.dumps({"rule_files": [str(RULES)], "evaluation_interval": "5m", "tests": tests}))
    promtool("test", "rules", str(path))


def test_the_cases_use_names_that_are_exported() -> None:
    labels = {family.name: set(family.labels) for family in FAMILIES}
    for name in HEALTHY:
        family, _, inner = name.partition("{")
        used = {part.split("=")[0] for part in inner.rstrip("}").split(",") if part}
        assert used == labels[f"quatro_{family}"], name
