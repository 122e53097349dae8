"""The overlay `cpu-demo` from its image: head, worker and submitter on hosts of their own, as KubeRay starts them."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deploy.images import build
from tests.deploy.pods import Cluster, cluster
from tests.deploy.tools import SHORT, call, needs
from tests.real.hosts import network
from tests.unit.deploy.overlays import Overlay, render


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    needs("cluster", "buildah", "debootstrap", "podman", "kubectl", "ip")
    image = build("cpu", deadline_s=3000)
    volume = tmp_path_factory.mktemp("volume")
    volume.chmod(0o777)
    overlay = Overlay("cpu-demo", render("overlays/cpu-demo"))
    with network(3, tmp_path_factory.mktemp("hosts")) as hosts:
        for host in hosts:  # as pods have one; Ray looks up its own address by it
            call("ip", "-n", host.namespace, "route", "add", "default", "dev", "eth0")
        with cluster(overlay, image, hosts, volume) as made:
            yield made


@pytest.mark.timeout(3600)
def test_both_nodes_are_healthy_and_want_the_token(running: Cluster) -> None:
    assert running.head.is_healthy() and running.worker.is_healthy()
    address = f"--address={running.gcs}"
    assert "2.0 CPU" in running.head.execute("ray", "status", address)
    with pytest.raises(AssertionError, match=r"(?i)token|unauth"):
        running.worker.execute("env", "-u", "RAY_AUTH_TOKEN", "HOME=/nowhere", "ray", "status", address)


@pytest.mark.timeout(1800)
def test_a_job_is_submitted_and_leaves_its_run_on_the_volume(running: Cluster) -> None:
    shown = running.submit("first", *SHORT)
    assert "step 12/12" in shown
    assert "succeeded" in running.job_status("first").lower()
    assert (running.volume / "demo/report.html").stat().st_uid == 1000


@pytest.mark.timeout(1800)
def test_the_hook_of_the_heads_pod_ends_a_job_with_a_checkpoint(running: Cluster) -> None:
    metrics = running.volume / "stopped/metrics.jsonl"
    job = threading.Thread(
        target=running.submit, args=("second", *SHORT, "run.num_steps=4000", "run.dir=/runs/stopped"), daemon=True
    )
    job.start()
    _wait(metrics, 3)
    hook = running.overlay.head.container["lifecycle"]["preStop"]["exec"]["command"]
    running.head.execute(*hook, deadline_s=300)
    last_step = json.loads(metrics.read_text().splitlines()[-1])["step"]
    assert (running.volume / f"stopped/checkpoints/step_{last_step}/manifest.json").exists()
    job.join(60)


def _wait(file: Path, num_lines: int, deadline_s: float = 600) -> None:
    end = time.monotonic() + deadline_s
    while not file.exists() or len(file.read_text().splitlines()) < num_lines:
        assert time.monotonic() < end, f"{file} has no {num_lines} lines after {deadline_s:g} s"
        time.sleep(1)
