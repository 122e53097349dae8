"""What docs/kuberay.md and docs/monitoring.md tell people to write is what they promise."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.unit.deploy.overlays import KUBERAY, ROOT, Overlay, render
from tests.unit.deploy.schemas import problems

pytestmark = pytest.mark.process


def test_the_example_of_an_own_overlay(tmp_path: Path) -> None:
    render("storage")  # skips without kubectl
    example = re.search(r"```yaml\n(.*?)```", (ROOT / "docs/kuberay.md").read_text(), re.DOTALL)
    assert example
    text = example[1].replace("../deploy/kuberay", os.path.relpath(KUBERAY, tmp_path))
    (tmp_path / "kustomization.yaml").write_text(text)
    rendered = subprocess.run(["kubectl", "kustomize", tmp_path], capture_output=True, text=True, timeout=60)
    assert rendered.returncode == 0, rendered.stderr
    own = Overlay("own", tuple(yaml.safe_load_all(rendered.stdout)))
    assert problems(own.ray) == []
    assert {each["metadata"]["namespace"] for each in own.objects} == {"training"}
    assert own.ray["metadata"]["name"] == "quatro-ray-one-node-mine" == own.one("ServiceAccount")["metadata"]["name"]
    assert own.head.labels["app.kubernetes.io/instance"] == own.ray["metadata"]["name"]
    assert own.head.container["image"] == "registry.example.com/quatro-ray:0.1.0"
    assert own.command[3:] == ["run.dir=/runs/mine", "run.resume=auto", "checkpoint.grace_s=300"]


def own_overlay(over: str, folder: Path) -> Overlay:
    """An overlay with another suffix and a volume of its own."""
    volume = (KUBERAY / "storage/persistentvolumeclaim.yaml").read_text()
    (folder / "volume.yaml").write_text(volume)
    resources = [os.path.relpath(KUBERAY / "overlays" / over, folder)]
    if over != "cpu-demo":  # brings its own
        resources.append("volume.yaml")
    own: dict[str, Any] = {"resources": resources, "nameSuffix": "-mine"}
    if over == "fault-tolerant-gcs":
        found = re.search(r"```yaml\n(replacements:.*?)```", (ROOT / "docs/kuberay.md").read_text(), re.DOTALL)
        assert found
        own |= yaml.safe_load(found[1])
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(own))
    rendered = subprocess.run(["kubectl", "kustomize", folder], capture_output=True, text=True, timeout=60)
    assert rendered.returncode == 0, rendered.stderr
    return Overlay("own", tuple(yaml.safe_load_all(rendered.stdout)))


def test_names_that_refer_to_others_change_with_them(overlay: Overlay, tmp_path: Path) -> None:
    own = own_overlay(overlay.name, tmp_path)
    assert problems(own.ray) == []
    assert own.ray["metadata"]["name"].endswith(f"{overlay.name}-mine")
    (claim,) = (each["metadata"]["name"] for each in own.all_of("PersistentVolumeClaim"))
    assert claim.endswith("-mine")
    for group in own.groups:
        claims = [v["persistentVolumeClaim"]["claimName"] for v in group.pod["volumes"] if "persistentVolumeClaim" in v]
        assert claims == [claim]
        assert group.pod["serviceAccountName"] == own.one("ServiceAccount")["metadata"]["name"]
    if redis := own.cluster.get("gcsFaultToleranceOptions"):
        (service,) = own.all_of("Service")
        assert redis["redisAddress"] == f"{service['metadata']['name']}:6379"


def test_the_alert_rules_for_the_prometheus_operator(tmp_path: Path) -> None:
    found = re.search(r"```bash\n(.*?PrometheusRule.*?)```", (ROOT / "docs/monitoring.md").read_text(), re.DOTALL)
    assert found
    kubectl = tmp_path / "kubectl"  # takes the place of a cluster: nothing here knows the operator's definitions
    kubectl.write_text("#!/bin/sh\ncat\n")
    kubectl.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    done = subprocess.run(
        ["bash", "-c", found[1]], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )
    rule = yaml.safe_load(done.stdout)
    assert rule["kind"] == "PrometheusRule" and rule["apiVersion"] == "monitoring.coreos.com/v1"
    assert rule["spec"] == yaml.safe_load((ROOT / "deploy/prometheus/alerts.yaml").read_text())
