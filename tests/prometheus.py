"""Prometheus and its promtool, which Debian has as one package."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

needs_prometheus = pytest.mark.skipif(
    not (shutil.which("prometheus") and shutil.which("promtool")) and "QUATRO_REQUIRE_PROMETHEUS" not in os.environ,
    reason="Prometheus is not installed: apt install prometheus (QUATRO_REQUIRE_PROMETHEUS=1 makes this a failure)",
)

DASHBOARD = Path(__file__).parents[1] / "deploy/grafana/dashboard.json"


def dashboard_queries() -> list[tuple[str, str]]:
    """Title and query of every target in Grafana's dashboard."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    return [(panel["title"], target["expr"]) for panel in panels for target in panel.get("targets", [])]
