"""Pods of a RayJob as KubeRay 1.7 makes them, on hosts of their own: podman instead of a kubelet."""

from __future__ import annotations

import json
import secrets
import shlex
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml

from tests.deploy.images import limits, podman, podman_command
from tests.real.hosts import Host
from tests.unit.deploy.overlays import Group, Overlay, quantity

AGENT, DASHBOARD, GCS, METRICS = 52365, 8265, 6379, 8080
READY = f"wget --tries 1 -T 2 -q -O- http://localhost:{AGENT}/api/local_raylet_healthz | grep success"
READY_HEAD = f"{READY} && wget --tries 1 -T 10 -q -O- http://localhost:{DASHBOARD}/api/gcs_healthz | grep success"
"""The probes that KubeRay gives a pod."""


@dataclass(frozen=True)
class Pod:
    """A running container."""

    name: str

    def execute(self, *command: str, deadline_s: float = 120) -> str:
        return podman("exec", self.name, *command, deadline_s=deadline_s)

    def is_healthy(self) -> bool:
        """What the health check of the image says."""
        return self._succeeds("healthcheck", "run", self.name)

    def until_ready(self, probe: str, deadline_s: float = 180) -> None:
        end = time.monotonic() + deadline_s
        while not self._succeeds("exec", self.name, "bash", "-c", probe):
            assert time.monotonic() < end, podman("logs", self.name)
            time.sleep(2)

    def _succeeds(self, *command: str) -> bool:
        return subprocess.run(podman_command(*command), capture_output=True, timeout=60).returncode == 0


class Cluster:
    """The head, the worker and the submitters of an overlay.

    Attributes:
        hosts: of head, worker and submitters.
        volume: the folder that takes the place of the volume `runs`.
    """

    def __init__(self, overlay: Overlay, image: str, hosts: list[Host], volume: Path) -> None:
        self.overlay = overlay
        self.hosts = hosts
        self.volume = volume
        self.gcs = f"{hosts[0].address}:{GCS}"
        self.head, self.worker = (Pod(f"{host.namespace}-ray") for host in hosts[:2])
        self._dashboard = f"http://{hosts[0].address}:{DASHBOARD}"
        self._image = image
        self._token = secrets.token_hex(16)  # KubeRay makes a Secret
        self._names: list[str] = []

    def start(self) -> None:
        """Start head and worker, and wait until KubeRay's probes find both ready."""
        self._start_node(self.head, self.hosts[0], self.overlay.head, "--head", f"127.0.0.1:{GCS}")
        self.head.until_ready(READY_HEAD)
        wait = f"until ray health-check --address {self.gcs} >/dev/null 2>&1; do sleep 1; done"
        self._run(f"{self.hosts[1].namespace}-init", self.hosts[1], ["/bin/bash", "-c", "--", wait])
        self._start_node(self.worker, self.hosts[1], self.overlay.workers[0], f"--address={self.gcs}", self.gcs)
        self.worker.until_ready(READY)

    def _start_node(self, pod: Pod, host: Host, group: Group, role: str, gcs: str) -> None:
        parameters = {
            "memory": int(group.limits["memory"]),
            "num-cpus": int(group.limits["cpu"]),
            "metrics-export-port": METRICS,
            "dashboard-agent-listen-port": AGENT,
        } | group.start_params
        command = " ".join(["ray start", role, "--block", *(f"--{key}={value}" for key, value in parameters.items())])
        shm = next(int(quantity(v["emptyDir"]["sizeLimit"])) for v in group.pod["volumes"] if v["name"] == "shm")
        options = ["--detach", "--mount", f"type=tmpfs,destination=/dev/shm,tmpfs-size={shm},tmpfs-mode=1777"]
        environment = group.environment | {"RAY_ADDRESS": gcs}
        self._run(pod.name, host, ["/bin/bash", "-c", "--", command], options, environment)

    def _run(
        self,
        name: str,
        host: Host,
        command: Sequence[str],
        options: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        deadline_s: float = 300,
    ) -> str:
        """Run a container on a host, as the user of the pods and without further rights; return its output."""
        user = self.overlay.head.pod["securityContext"]["runAsUser"]
        variables = {**(environment or {}), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self._token}
        self._names.append(name)
        return podman(
            "run", "--name", name, "--network", f"ns:/run/netns/{host.namespace}", *limits(),
            "--user", str(user), "--security-opt", "no-new-privileges", "--volume", f"{self.volume}:/runs",
            *(part for key, value in variables.items() for part in ("--env", f"{key}={value}")),
            *options, self._image, *command,
            deadline_s=deadline_s,
        )  # fmt: skip

    def submit(self, job_id: str, *overrides: str, deadline_s: float = 900) -> str:
        """Run the job of the overlay with these overrides, as the submitter of K8sJobMode does; return its logs."""
        assert self.overlay.job is not None
        entrypoint = shlex.join([*self.overlay.command, *overrides])
        environment = shlex.quote(json.dumps(yaml.safe_load(self.overlay.job["runtimeEnvYAML"])))
        to = f"--address {self._dashboard}"
        script = (
            f"if ! ray job status {to} {job_id} >/dev/null 2>&1; then ray job submit {to} --no-wait "
            f"--submission-id {job_id} --runtime-env-json {environment} -- {entrypoint}; fi; "
            f"ray job logs {to} --follow {job_id}"
        )
        name = f"{self.hosts[2].namespace}-{job_id}"
        return self._run(name, self.hosts[2], ["/bin/bash", "-ce", "--", script], deadline_s=deadline_s)

    def job_status(self, job_id: str) -> str:
        return self.head.execute("ray", "job", "status", job_id, "--address", self._dashboard)

    def remove(self) -> None:
        """End all containers and remove them."""
        for name in self._names:
            podman("rm", "--force", "--time", "0", name)


@contextmanager
def cluster(overlay: Overlay, image: str, hosts: list[Host], volume: Path) -> Iterator[Cluster]:
    """A running cluster; its containers are removed at the end."""
    made = Cluster(overlay, image, hosts, volume)
    try:
        made.start()
        yield made
    finally:
        made.remove()
