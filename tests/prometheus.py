"""Prometheus and its promtool, which Debian has as one package."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest
import yaml

from tests.real.nodes import free_port

needs_prometheus = pytest.mark.skipif(
    not (shutil.which("prometheus") and shutil.which("promtool")) and "QUATRO_REQUIRE_PROMETHEUS" not in os.environ,
    reason="Prometheus is not installed: apt install prometheus (QUATRO_REQUIRE_PROMETHEUS=1 makes this a failure)",
)

DASHBOARD = Path(__file__).parents[1] / "deploy/grafana/dashboard.json"
DEPLOY = DASHBOARD.parents[1] / "prometheus"


def dashboard_queries() -> list[tuple[str, str]]:
    """Title and query of every target in Grafana's dashboard."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    return [(panel["title"], target["expr"]) for panel in panels for target in panel.get("targets", [])]


@dataclass
class Prometheus:
    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def get(self, path: str, **parameters: object) -> Any:
        with urlopen(f"{self.url}/api/v1/{path}?{urlencode(parameters)}", timeout=30) as answer:
            body = json.load(answer)
        assert body["status"] == "success", body
        return body["data"]

    def series(self, query: str) -> list[Any]:
        """Over the last five minutes, as Grafana asks."""
        now = time.time()
        return self.get("query_range", query=query, start=now - 300, end=now, step=1)["result"]

    def is_ready(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        try:
            return urlopen(f"{self.url}/-/ready", timeout=5).status == 200
        except URLError:
            return False


def example() -> dict[str, Any]:
    """The example's configuration, to be used in any folder."""
    config: dict[str, Any] = yaml.safe_load((DEPLOY / "prometheus.yaml").read_text())
    config["rule_files"] = [str(DEPLOY / name) for name in config["rule_files"]]
    return config


@contextmanager
def prometheus(folder: Path, config: dict[str, Any]) -> Iterator[Prometheus]:
    """A Prometheus with this configuration, on a port of 127.0.0.1; it may not be ready yet."""
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
    address, log = f"127.0.0.1:{free_port()}", folder / "prometheus.log"
    command = ["prometheus", f"--config.file={folder / 'prometheus.yaml'}", f"--web.listen-address={address}"]
    with log.open("w") as out:
        process = subprocess.Popen(
            [*command, f"--storage.tsdb.path={folder / 'tsdb'}"], stdout=out, stderr=subprocess.STDOUT
        )
    try:
        yield Prometheus(f"http://{address}", process, log)
    finally:
        process.kill()
        process.wait(timeout=30)
