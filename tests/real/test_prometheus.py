"""A real Prometheus scrapes a real run, and answers every query of the dashboard and of the alerts."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import yaml

from tests.make import config_tree
from tests.prometheus import DEPLOY, Prometheus, dashboard_queries, example, needs_prometheus, prometheus
from tests.real.training import Training

pytestmark = needs_prometheus

ADDRESS = re.compile(r"metrics for Prometheus: http://(\S+)/metrics")
MAY_BE_EMPTY = {"Engine and learner disagree by, nats"}
"""Panels of what few steps measure: this one needs tokens of the learner's own version, or a check of the engines."""


def scraping(target: str) -> dict[str, Any]:
    """The example's configuration, with a scrape each second of one address."""
    config = example()
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    (job,) = config["scrape_configs"]
    del job["file_sd_configs"]
    job["static_configs"] = [{"targets": [target]}]
    return config


def training(model: str, folder: Path) -> Training:
    sums = {"kind": "chain_sum", "max_digits": 1, "num_questions": 92}
    tree = config_tree(
        folder / "run",
        model={"kind": "pretrained", "path": model},
        run={"num_steps": 10_000},
        evaluation={"num_queries": 2, "samples_per_query": 8},
        data={"train": {"sums": sums}, "eval": {"sums": sums | {"num_questions": 8, "seed": 1}}},
    )
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    return Training(tree, environment | {"RAY_metrics_report_interval_ms": "2000"}, folder)


def address_of(run: Training) -> str:
    notes = run.run / "notes.log"
    run.wait_until(lambda: notes.is_file() and "metrics for Prometheus" in notes.read_text())
    found = ADDRESS.search(notes.read_text())
    assert found, notes.read_text()
    return found[1]


def check_dashboard(server: Prometheus) -> None:
    """A panel may need a few more steps, because a step without different rewards measures less."""
    queries = [
        (title, query.replace("$run", "run").replace("$__rate_interval", "1m")) for title, query in dashboard_queries()
    ]
    deadline = time.monotonic() + 120
    while (empty := {title for title, query in queries if not server.series(query)}) - MAY_BE_EMPTY:
        assert time.monotonic() < deadline, empty
        time.sleep(1)


def check_values_stay(server: Prometheus) -> None:
    """Ray forgets a value after two reports, and this one is the same from the start of the run."""
    assert server.get("query", query='ray_quatro_num_steps{run="run"}')["result"]


def check_alerts(server: Prometheus) -> None:
    """Prometheus evaluates them, and has every metric that they use."""
    rules = [rule for group in server.get("rules")["groups"] for rule in group["rules"]]
    loaded = yaml.safe_load((DEPLOY / "alerts.yaml").read_text())["groups"]
    assert len(rules) == sum(len(group["rules"]) for group in loaded)
    assert {rule["health"] for rule in rules} == {"ok"}, rules
    for rule in rules:
        server.get("query", query=rule["query"])
    names = {name for rule in rules for name in re.findall(r"ray_quatro_\w+", rule["query"])}
    assert {name for name in names if not server.series(f'{name}{{run="run"}}')} == set()


def test_every_query_of_dashboard_and_alerts_is_answered(warm_model_path: str, tmp_path: Path) -> None:
    with training(warm_model_path, tmp_path) as run, prometheus(tmp_path, scraping(address_of(run))) as server:
        run.wait_until(server.is_ready)
        run.wait_for_steps(3)
        run.wait_until(lambda: bool(server.series("ray_quatro_step >= 3")))
        check_dashboard(server)
        check_alerts(server)
        check_values_stay(server)
        run.process.send_signal(signal.SIGTERM)
        assert run.process.wait(timeout=240) == 128 + signal.SIGTERM, run.log.read_text()
