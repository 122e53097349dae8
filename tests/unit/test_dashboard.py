"""Grafana's dashboard is what its script writes, and it and the alerts use names and labels that are exported."""

from __future__ import annotations

import json
import re
import runpy
from collections.abc import Iterator
from pathlib import Path

import yaml

from quatro_ray.telemetry.prometheus_names import FAMILIES
from tests.prometheus import DASHBOARD, dashboard_queries

RULES = yaml.safe_load((DASHBOARD.parents[1] / "prometheus/alerts.yaml").read_text())
LABELS = {f"ray_{family.name}": {"run", *family.labels} for family in FAMILIES}
SELECTOR = re.compile(r"(ray_quatro_\w+)(?:\{([^}]*)\})?")


def queries() -> Iterator[str]:
    yield from (query for _, query in dashboard_queries())
    yield from (rule["expr"] for group in RULES["groups"] for rule in group["rules"])


def test_the_file_is_what_the_script_writes() -> None:
    script = DASHBOARD.with_name("make_dashboard.py")
    assert DASHBOARD.read_text() == runpy.run_path(str(script))["text"](), f"run: python {script}"


def test_queries_use_what_is_exported() -> None:
    for query in queries():
        for name, labels in SELECTOR.findall(query):
            used = set(re.findall(r"(\w+)(?:=~|!~|!=|=)", labels))
            assert name in LABELS and used <= LABELS[name], query


def test_panels_do_not_overlap_and_have_their_own_ids() -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells) and all(x < 24 for x, _ in cells)


def test_alerts_say_what_to_do() -> None:
    root = Path(__file__).parents[2]
    for rule in (rule for group in RULES["groups"] for rule in group["rules"]):
        pages = re.findall(r"docs/\w+\.md", rule["annotations"]["description"])
        assert pages and all((root / page).is_file() for page in pages), rule["alert"]
        assert "by (run)" in rule["expr"] and "$labels.run" in rule["annotations"]["summary"]
