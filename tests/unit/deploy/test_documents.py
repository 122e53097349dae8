"""What docs/kuberay.md and docs/monitoring.md tell people to write is what they promise."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

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
