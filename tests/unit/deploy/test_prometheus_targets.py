"""A real Prometheus with the project's own configuration finds the nodes of a cluster in the file that Ray writes."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.prometheus import Prometheus, example, needs_prometheus, prometheus

pytestmark = [pytest.mark.process, needs_prometheus]

NAME = "prom_metrics_service_discovery.json"


def write(session: Path, *targets: str) -> None:
    """Do as Ray (2.60) does every 5 s: replace the file in the folder of the session."""
    temporary = session / f"tmp_{NAME}"
    temporary.write_text(json.dumps([{"labels": {"job": "ray"}, "targets": targets}]))
    os.replace(temporary, session / NAME)


def targets_of(server: Prometheus) -> set[str]:
    return {target["labels"]["instance"] for target in server.get("targets")["activeTargets"]}


def wait_until(is_done: Callable[[], bool], server: Prometheus) -> None:
    deadline = time.monotonic() + 60
    while not is_done():
        assert time.monotonic() < deadline, server.log.read_text()
        time.sleep(0.2)


def test_a_node_that_joins_is_found_behind_the_link(tmp_path: Path) -> None:
    session, link = tmp_path / "session", tmp_path / "ray" / NAME
    session.mkdir()
    link.parent.mkdir()
    link.symlink_to(session / NAME)
    write(session, "127.0.0.1:1")
    config = example()
    (job,) = config["scrape_configs"]
    (discovery,) = job["file_sd_configs"]
    (path,) = discovery["files"]
    assert Path(path).name == NAME
    discovery["files"] = [str(link)]
    with prometheus(tmp_path, config) as server:
        wait_until(server.is_ready, server)
        wait_until(lambda: targets_of(server) == {"127.0.0.1:1"}, server)
        write(session, "127.0.0.1:1", "127.0.0.1:2")
        wait_until(lambda: targets_of(server) == {"127.0.0.1:1", "127.0.0.1:2"}, server)
