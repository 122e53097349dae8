"""Pods of a RayJob as KubeRay 1.7 makes them, on hosts of their own: podman instead of a kubelet."""

from __future__ import annotations

import json
import secrets
import shlex
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from tests.deploy.images import limits, podman, podman_command
from tests.real.hosts import Host
from tests.unit.deploy.overlays import Group, Overlay, quantity

AGENT, DASHBOARD, GCS, METRICS = 52365, 8265, 6379, 8080
READY = f"wget --tries 1 -T 2 -q -O- http://localhost:{AGENT}/api/local_raylet_healthz | grep success"
READY_HEAD = f"{READY} && wget --tries 1 -T 10 -q -O- http://localhost:{DASHBOARD}/api/gcs_healthz | grep success"


@dataclass
class Cluster:
    """The head, the worker and the submitters of an overlay.

    Attributes:
        volume: the folder that takes the place of the volume `runs`.
        token: what KubeRay's Secret has.
    """

    overlay: Overlay
    image: str
    hosts: list[Host]
    volume: Path
    token: str = field(default_factory=lambda: secrets.token_hex(16))
    names: list[str] = field(default_factory=list)

    @property
    def gcs(self) -> str:
        return f"{self.hosts[0].address}:{GCS}"

    def start(self) -> None:
        """Start head and worker, and wait until KubeRay's probes find both ready."""
        self._start_node("head", self.overlay.head, self.hosts[0], "--head --block")
        self.until_ready("head", READY_HEAD)
        wait = f"until ray health-check --address {self.gcs} >/dev/null 2>&1; do sleep 1; done"
        self._run("init", self.hosts[1], self.overlay.workers[0], {}, ["--rm"], ["/bin/bash", "-c", "--", wait])
        self._start_node("worker", self.overlay.workers[0], self.hosts[1], f"--address={self.gcs} --block")
        self.until_ready("worker", READY)

    def _start_node(self, name: str, group: Group, host: Host, options: str) -> None:
        parameters = {
            "memory": int(group.limits["memory"]),
            "num-cpus": int(group.limits["cpu"]),
            "metrics-export-port": METRICS,
            "dashboard-agent-listen-port": AGENT,
        } | group.spec["rayStartParams"]
        command = " ".join(["ray start", options, *(f"--{key}={value}" for key, value in parameters.items())])
        shm = next(int(quantity(v["emptyDir"]["sizeLimit"])) for v in group.pod["volumes"] if v["name"] == "shm")
        options_ = ["--detach", "--mount", f"type=tmpfs,destination=/dev/shm,tmpfs-size={shm},tmpfs-mode=1777"]
        environment = group.environment | {"RAY_ADDRESS": f"127.0.0.1:{GCS}" if name == "head" else self.gcs}
        self._run(name, host, group, environment, options_, ["/bin/bash", "-c", "--", f"{command}"])

    def _run(
        self, name: str, host: Host, group: Group, environment: dict[str, str], options: list[str], command: list[str]
    ) -> str:
        name = f"{host.namespace}-{name}"
        if "--rm" not in options:
            self.names.append(name)
        variables = environment | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token, "RAY_CLUSTER_NAME": "test"}
        return podman(
            "run", "--name", name, "--network", f"ns:/run/netns/{host.namespace}", *limits(),
            "--user", str(group.pod["securityContext"]["runAsUser"]), "--security-opt", "no-new-privileges",
            "--volume", f"{self.volume}:/runs",
            *(part for key, value in variables.items() for part in ("--env", f"{key}={value}")),
            *options, self.image, *command,
            deadline_s=300,
        )  # fmt: skip

    def execute(self, pod: str, *command: str, deadline_s: float = 120) -> str:
        host = self.hosts[pod == "worker"]
        return podman("exec", f"{host.namespace}-{pod}", *command, deadline_s=deadline_s)

    def healthy(self, pod: str) -> bool:
        host = self.hosts[pod == "worker"]
        command = podman_command("healthcheck", "run", f"{host.namespace}-{pod}")
        return subprocess.run(command, capture_output=True, timeout=60).returncode == 0

    def until_ready(self, pod: str, probe: str, deadline_s: float = 180) -> None:
        host = self.hosts[pod == "worker"]
        end = time.monotonic() + deadline_s
        command = podman_command("exec", f"{host.namespace}-{pod}", "bash", "-c", probe)
        while subprocess.run(command, capture_output=True, timeout=60).returncode != 0:
            assert time.monotonic() < end, podman("logs", f"{host.namespace}-{pod}")
            time.sleep(2)

    def submit(self, job_id: str, *overrides: str, deadline_s: float = 900) -> str:
        """Run the job of the overlay with these overrides, as the submitter of K8sJobMode does; return its logs."""
        assert self.overlay.job is not None
        address = f"http://{self.hosts[0].address}:{DASHBOARD}"
        entrypoint = shlex.join([*self.overlay.command, *overrides])
        environment = shlex.quote(json.dumps(yaml.safe_load(self.overlay.job["runtimeEnvYAML"])))
        to = f"--address {address}"
        script = (
            f"if ! ray job status {to} {job_id} >/dev/null 2>&1; then ray job submit {to} --no-wait "
            f"--submission-id {job_id} --runtime-env-json {environment} -- {entrypoint}; fi; "
            f"ray job logs {to} --follow {job_id}"
        )
        name = f"{self.hosts[2].namespace}-submitter-{job_id}"
        self.names.append(name)
        return podman(
            "run", "--name", name, "--network", f"ns:/run/netns/{self.hosts[2].namespace}", *limits(),
            "--user", "1000", "--security-opt", "no-new-privileges",
            "--env", "RAY_AUTH_MODE=token", "--env", f"RAY_AUTH_TOKEN={self.token}",
            self.image, "/bin/bash", "-ce", "--", script,
            deadline_s=deadline_s,
        )  # fmt: skip

    def job_status(self, job_id: str) -> str:
        return self.execute("head", "ray", "job", "status", job_id, "--address", f"http://127.0.0.1:{DASHBOARD}")


@contextmanager
def cluster(overlay: Overlay, image: str, hosts: list[Host], volume: Path) -> Iterator[Cluster]:
    """A running cluster; its containers are removed at the end."""
    made = Cluster(overlay, image, hosts, volume)
    try:
        made.start()
        yield made
    finally:
        for name in made.names:
            podman("rm", "--force", "--time", "0", name)
