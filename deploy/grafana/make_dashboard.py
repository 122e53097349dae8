"""Writes dashboard.json beside it: `python deploy/grafana/make_dashboard.py`. Change the dashboard here, not there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

WIDTH, HEIGHT = 8, 7
RUN = 'run=~"$run"'
SOURCE = {"type": "prometheus", "uid": "${datasource}"}


def value(name: str, *by: str, labels: str = "", how: str = "max") -> str:
    """Return the query of a gauge, aggregated over the processes of a run that was resumed."""
    return f"{how} by ({', '.join(('run', *by))}) (ray_quatro_{name}{{{RUN}{labels and ', ' + labels}}})"


def per_hour(name: str, *by: str) -> str:
    """Return the query of a count's growth in an hour."""
    inner = f"rate(ray_quatro_{name}{{{RUN}}}[$__rate_interval])"
    return f"3600 * sum by ({', '.join(('run', *by))}) ({inner})"


def within(name: str, *by: str) -> str:
    """Return the query of a count's growth in the last half hour, as the alerts use it."""
    return f"sum by ({', '.join(('run', *by))}) (increase(ray_quatro_{name}{{{RUN}}}[30m]))"


GROUPS, DROPS = within("groups_total"), within("drops_total")
ROWS: dict[str, list[tuple[str, str, list[tuple[str, str]]]]] = {
    "Progress": [
        ("Step", "none", [(value("step"), "{{run}}"), (value("num_steps"), "{{run}}: end")]),
        ("Reward", "none", [(value("reward_mean"), "{{run}}")]),
        ("Held-out pass@k", "percentunit", [(value("evaluation_pass_at", "set", "k"), "{{run}}: {{set}} pass@{{k}}")]),
        ("Pass rate of the batch", "percentunit", [(value("pass_rate"), "{{run}}")]),
        ("Time since the last step", "s", [(f"time() - {value('last_step_timestamp_seconds')}", "{{run}}")]),
        ("Duration of a step", "s", [(value("step_seconds"), "{{run}}")]),
    ],
    "Policy": [
        ("Trust region", "percentunit", [(value("trust_region_share", "status"), "{{run}}: {{status}}")]),
        ("KL from the behaviour policy, nats", "none", [(value("realised_kl_nats"), "{{run}}: policy"),
         (value("target_kl_nats"), "{{run}}: target")]),
        ("Step control: share of the step kept", "percentunit", [(value("step_control_kept"), "{{run}}")]),
        ("Staleness", "none", [(value("staleness_mean"), "{{run}}: mean"), (value("staleness_max"), "{{run}}: max"),
         (value("max_staleness"), "{{run}}: limit")]),
        ("Effective sample size", "percentunit", [(value("token_eff_sample_size"), "{{run}}: tokens"),
         (value("eff_sample_size"), "{{run}}: responses")]),
        ("Entropy, nats per token", "none", [(value("entropy_nats"), "{{run}}")]),
        ("Gradient norm", "none", [(value("grad_norm"), "{{run}}")]),
        ("Engine and learner disagree by, nats", "none", [(value("logprob_abs_diff"), "{{run}}: fresh tokens"),
         (value("checked_logprob_abs_diff"), "{{run}}: check")]),
        ("Steps not taken, per hour", "none", [(per_hour("skipped_steps_total"), "{{run}}: not finite"),
         (per_hour("uninformative_steps_total"), "{{run}}: no preference")]),
    ],
    "Where the time went": [
        ("Learner", "percentunit", [(value("time_share", "state", labels='role="learner"'), "{{run}}: {{state}}")]),
        ("Engines", "percentunit", [(value("time_share", "state", labels='role="generators"'), "{{run}}: {{state}}")]),
        ("Verifiers", "percentunit", [(value("time_share", "state", labels='role="verifiers"'), "{{run}}: {{state}}")]),
        ("Tokens per second", "none", [(value("generated_tokens_per_second"), "{{run}}: generated"),
         (value("trained_tokens_per_second"), "{{run}}: trained")]),
        ("Weight update", "s", [(value("weight_sync_pause_seconds"), "{{run}}: pause"),
         (value("weight_sync_transfer_seconds"), "{{run}}: transfer")]),
        ("Buffer", "none", [(value("buffer_groups"), "{{run}}: ready groups")]),
    ],
    "Groups": [
        ("Share of the groups that are trained", "percentunit", [(f"{GROUPS} / ({GROUPS} + {DROPS})", "{{run}}")]),
        ("Dropped groups per hour", "none", [(per_hour("drops_total", "reason"), "{{run}}: {{reason}}")]),
        ("Reward by source", "none", [(value("source_reward_mean", "source"), "{{run}}: {{source}}")]),
        ("Response length, tokens", "none", [(value("response_tokens_mean"), "{{run}}: mean"),
         (value("response_tokens_max"), "{{run}}: max")]),
        ("Truncated responses", "percentunit", [(value("truncated_share"), "{{run}}")]),
        ("Responses not scored as usual", "percentunit",
         [(value("verifier_outcome_share", "outcome"), "{{run}}: {{outcome}}")]),
    ],
    "Health": [
        ("Engines", "none", [(value("engines"), "{{run}}: work"), (value("num_engines"), "{{run}}: configured")]),
        ("Events in 30 minutes", "none", [(within("events_total", "event", "part"), "{{run}}: {{part}} {{event}}")]),
        ("Losses since the run began", "none", [(value("losses_total", "what"), "{{run}}: {{what}}")]),
    ],
}  # fmt: skip


def panel(number: int, y: int, title: str, unit: str, queries: list[tuple[str, str]]) -> dict[str, Any]:
    """Return a time series panel."""
    return {
        "id": 1 + number,
        "type": "timeseries",
        "title": title,
        "datasource": SOURCE,
        "gridPos": {"x": WIDTH * (number % 3), "y": y, "w": WIDTH, "h": HEIGHT},
        "fieldConfig": {"defaults": {"unit": unit, "custom": {"spanNulls": True}}, "overrides": []},
        "options": {"tooltip": {"mode": "multi", "sort": "desc"}},
        "targets": [
            {"refId": chr(ord("A") + i), "datasource": SOURCE, "expr": expr, "legendFormat": legend}
            for i, (expr, legend) in enumerate(queries)
        ],
    }


def dashboard() -> dict[str, Any]:
    """Return the dashboard as Grafana imports it."""
    panels: list[dict[str, Any]] = []
    y = 0
    for row, (title, members) in enumerate(ROWS.items()):
        panels.append(
            {
                "id": 1000 + row,
                "type": "row",
                "title": title,
                "gridPos": {"x": 0, "y": y, "w": 24, "h": 1},
                "panels": [],
            }
        )
        y += 1
        for i, member in enumerate(members):
            panels.append(panel(30 * row + i, y + HEIGHT * (i // 3), *member))
        y += HEIGHT * -(-len(members) // 3)
    run = {
        "name": "run",
        "type": "query",
        "datasource": SOURCE,
        "query": {"query": "label_values(ray_quatro_step, run)", "refId": "runs"},
        "refresh": 2,
        "sort": 1,
        "multi": True,
        "includeAll": True,
    }
    return {
        "uid": "quatro-ray",
        "title": "quatro_ray",
        "tags": ["quatro_ray", "ray"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "templating": {"list": [{"name": "datasource", "type": "datasource", "query": "prometheus"}, run]},
        "panels": panels,
    }


def text() -> str:
    """Return the dashboard as JSON with a line for each panel."""
    made = dashboard()
    panels = ",\n  ".join(json.dumps(panel) for panel in made["panels"])
    return json.dumps(made | {"panels": None}, indent=1).replace("null", f"[\n  {panels}\n ]") + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("dashboard.json").write_text(text())
