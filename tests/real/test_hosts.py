"""Three hosts with their own addresses: one is cut off and comes back, one dies, and the run continues."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.make import config_tree
from tests.real.hosts import Host, RayHost, needs_hosts, network
from tests.real.nodes import BIN
from tests.real.training import Training

pytestmark = [needs_hosts, pytest.mark.soak, pytest.mark.timeout(1800)]

PORT = 6379


@contextmanager
def ray_hosts() -> Iterator[list[RayHost]]:
    """Room for an engine on each of the first two, and for both ranks only on the third. The first is the head."""
    base = Path(f"/tmp/qr{secrets.token_hex(2)}")  # sockets live under it, and their names may have 107 bytes at most
    base.mkdir()
    environment = os.environ | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1",
        "HOME": str(base),
    }
    try:
        with network(3, base) as hosts:
            joined = f"--address={hosts[0].address}:{PORT}"
            is_head = ["--head", f"--port={PORT}", "--include-dashboard=false"]
            nodes = [
                RayHost(hosts[0], [*is_head, "--num-cpus=3"], environment),
                RayHost(hosts[1], [joined, "--num-cpus=2"], environment),
                RayHost(hosts[2], [joined, "--num-cpus=6"], environment),
            ]
            try:
                yield nodes
            finally:
                for node in nodes:
                    node.kill()
    finally:
        shutil.rmtree(base, ignore_errors=True)


def tree(run_dir: Path, model: str, head: Host) -> dict[str, Any]:
    return config_tree(
        run_dir,
        model={"kind": "pretrained", "path": model},
        run={"num_steps": 100_000},
        generator={"num_engines": 2, "max_engines_lost": 5, "start_deadline_s": 240},
        learner={"start_deadline_s": 300, "num_ranks": 2, "learning_rate": 1e-3, "dtype": "float32",
                 "tokens_per_micro_batch": 64},
        checkpoint={"every_steps": 2},
        cluster={
            "device": "cpu", "address": f"{head.address}:{PORT}", "cpus_per_engine": 2, "cpus_per_rank": 3,
            "cpus_per_verifier": 0.05, "liveness_deadline_s": 30,
        },
    )  # fmt: skip


def wait_for_the_head(head: RayHost) -> None:
    deadline = time.monotonic() + 120
    command = head.enter(str(BIN / "ray"), "status", f"--address={head.host.address}:{PORT}")
    while subprocess.run(command, env=head.environment, capture_output=True).returncode:
        assert time.monotonic() < deadline, (head.host.folder / "ray.log").read_text()
        time.sleep(1)


def test_a_run_across_hosts(warm_model_path: str, tmp_path: Path) -> None:
    with ray_hosts() as (head, engines, ranks):
        head.start()
        wait_for_the_head(head)
        ranks.start()
        made = tree(tmp_path / "run", warm_model_path, head.host)
        with Training(made, head.environment, tmp_path, head.enter) as run:
            # a host is missing, and is waited for
            run.wait_until(lambda: "waiting for resources" in run.log.read_text())
            assert "the run needs " in run.log.read_text() and "CPUs and the cluster has 9" in run.log.read_text()
            engines.start()
            run.wait_for_steps(3)
            assert run.lines("metrics.jsonl")[-1]["health/engines"] == 2
            its_token_is_needed(head)

            ranks.host.cut_off()
            run.wait_for_event("lost", "learner")
            ranks.kill()  # Ray ends a node itself that finds out that it was given up
            ranks.host.reconnect()
            ranks.start()
            run.wait_for_event("recovered", "learner")
            run.wait_for_steps(3)
            run.wait_until(lambda: not run.down())

            engines.kill()
            run.wait_until(lambda: bool(run.down()))
            run.wait_for_steps(3)

            run.process.send_signal(signal.SIGTERM)
            assert run.process.wait(timeout=240) == 128 + signal.SIGTERM, run.log.read_text()


def its_token_is_needed(head: RayHost) -> None:
    without = {name: value for name, value in head.environment.items() if name != "RAY_AUTH_TOKEN"}
    command = head.enter(str(BIN / "ray"), "status", f"--address={head.host.address}:{PORT}")
    assert subprocess.run(command, env=without, capture_output=True, timeout=120).returncode != 0
