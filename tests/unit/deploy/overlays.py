"""The overlays of deploy/kuberay as kubectl renders them."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from quatro_ray.config import Config, load_config

ROOT = Path(__file__).parents[3]
BIN = Path(sys.executable).parent
"""Where the tools of the extra `dev` are."""
KUBERAY = ROOT / "deploy/kuberay"
OVERLAYS = sorted(path.name for path in (KUBERAY / "overlays").iterdir())

_SUFFIXES = {"": 1, "m": 1e-3, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def quantity(text: str) -> float:
    """A quantity of Kubernetes as a number."""
    number = re.fullmatch(r"([\d.]+)([a-zA-Z]*)", text)
    assert number and number[2] in _SUFFIXES, text
    return float(number[1]) * _SUFFIXES[number[2]]


@cache
def render(folder: str) -> tuple[dict[str, Any], ...]:
    """All objects of a folder below deploy/kuberay."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is missing: nothing renders the overlays")
    command = ["kubectl", "kustomize", str(KUBERAY / folder)]
    rendered = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert rendered.returncode == 0, rendered.stderr
    return tuple(yaml.safe_load_all(rendered.stdout))


@dataclass(frozen=True)
class Group:
    """Pods with one template: the head, or a group of workers."""

    spec: dict[str, Any]
    replicas: int
    is_head: bool

    @property
    def start_params(self) -> dict[str, str]:
        return self.spec["rayStartParams"]

    @property
    def labels(self) -> dict[str, str]:
        return self.spec["template"]["metadata"]["labels"]

    @property
    def pod(self) -> dict[str, Any]:
        return self.spec["template"]["spec"]

    @property
    def container(self) -> dict[str, Any]:
        """Ray's container, the only one."""
        (container,) = self.pod["containers"]
        return container

    @property
    def limits(self) -> dict[str, float]:
        """Resources of one pod, by their names in Kubernetes."""
        return {name: quantity(value) for name, value in self.container["resources"]["limits"].items()}

    @property
    def environment(self) -> dict[str, str]:
        return {entry["name"]: entry.get("value", "") for entry in self.container.get("env", [])}


@dataclass(frozen=True)
class Overlay:
    name: str
    objects: tuple[dict[str, Any], ...]

    def all_of(self, kind: str) -> list[dict[str, Any]]:
        return [each for each in self.objects if each["kind"] == kind]

    def one(self, kind: str) -> dict[str, Any]:
        """The object of this kind that has the name of the run."""
        (found,) = (each for each in self.all_of(kind) if each["metadata"]["name"] == self.ray["metadata"]["name"])
        return found

    @property
    def ray(self) -> dict[str, Any]:
        """The RayJob or the RayCluster."""
        (found,) = (each for each in self.objects if each["apiVersion"] == "ray.io/v1")
        return found

    @property
    def job(self) -> dict[str, Any] | None:
        """What a RayJob specifies; None for a RayCluster."""
        return self.ray["spec"] if self.ray["kind"] == "RayJob" else None

    @property
    def cluster(self) -> dict[str, Any]:
        """What the cluster is to be, in a RayJob or a RayCluster."""
        return self.ray["spec"]["rayClusterSpec"] if self.job else self.ray["spec"]

    @property
    def head(self) -> Group:
        return Group(self.cluster["headGroupSpec"], 1, is_head=True)

    @property
    def workers(self) -> list[Group]:
        return [Group(spec, spec["replicas"], is_head=False) for spec in self.cluster["workerGroupSpecs"]]

    @property
    def is_autoscaled(self) -> bool:
        return bool(self.cluster.get("enableInTreeAutoscaling"))

    @property
    def groups(self) -> list[Group]:
        return [self.head, *self.workers]

    @property
    def command(self) -> list[str]:
        """The job's command; a RayCluster is made for that of the base."""
        job = self.job or Overlay("base", render("base")).ray["spec"]
        return job["entrypoint"].split()

    @property
    def config_path(self) -> Path:
        """The file in the repository that the command names in the image."""
        assert self.command[:2] == ["quatro-ray", "train"]
        return ROOT / Path(self.command[2]).relative_to("/opt/quatro_ray")

    @property
    def config(self) -> Config:
        return load_config(self.config_path, self.command[3:])


def redis_address(overlay: Overlay) -> str:
    """RAY_REDIS_ADDRESS in the head, where Kubernetes puts the values of variables that are defined before it."""
    address = overlay.cluster["gcsFaultToleranceOptions"]["redisAddress"]
    return re.sub(r"\$\((\w+)\)", lambda name: overlay.head.environment[name[1]], address)
