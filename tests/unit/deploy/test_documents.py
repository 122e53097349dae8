"""What docs/kuberay.md and docs/monitoring.md tell people to write is what they promise."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.unit.deploy.overlays import KUBERAY, ROOT, Overlay, redis_address, render
from tests.unit.deploy.schemas import problems

pytestmark = pytest.mark.process


def rendered(folder: Path, own: dict[str, Any]) -> Overlay:
    """The objects of an overlay that is written into a folder."""
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(own))
    done = subprocess.run(["kubectl", "kustomize", folder], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return Overlay("own", tuple(yaml.safe_load_all(done.stdout)))


def example(over: str, folder: Path) -> dict[str, Any]:
    """The overlay that docs/kuberay.md shows, over any other; the name of one over a second one has both names."""
    found = re.search(r"```yaml\n(.*?)```", (ROOT / "docs/kuberay.md").read_text(), re.DOTALL)
    assert found
    name = Overlay(over, render(f"overlays/{over}")).ray["metadata"]["name"]  # skips without kubectl
    text = found[1].replace("../deploy/kuberay", os.path.relpath(KUBERAY, folder))
    text = text.replace("overlays/one-node", f"overlays/{over}").replace("quatro-ray-one-node", name)
    own: dict[str, Any] = yaml.safe_load(text)
    return own


def claims(own: Overlay) -> set[str]:
    volumes = [volume for group in own.groups for volume in group.pod["volumes"]]
    return {each["persistentVolumeClaim"]["claimName"] for each in volumes if "persistentVolumeClaim" in each}


def test_the_example_of_an_own_overlay(overlay: Overlay, tmp_path: Path) -> None:
    own = rendered(tmp_path, example(overlay.name, tmp_path))
    name = own.ray["metadata"]["name"]
    assert name == overlay.ray["metadata"]["name"] + "-mine" and len(name) <= 47
    assert problems(own.ray) == []
    assert {each["metadata"]["namespace"] for each in own.objects} == {"training"}
    assert {group.pod["serviceAccountName"] for group in own.groups} == {own.one("ServiceAccount")["metadata"]["name"]}
    assert {group.labels["app.kubernetes.io/instance"] for group in own.groups} == {name}
    assert {group.container["image"] for group in own.groups} == {"registry.example.com/quatro-ray:0.1.0"}
    volume = "quatro-ray-runs-cpu-demo-mine" if overlay.name == "cpu-demo" else "quatro-ray-runs"
    assert claims(own) == {volume}  # one that the overlay does not bring keeps its name
    if own.job is not None:
        assert own.command[3:] == ["run.dir=/runs/mine", "run.resume=auto", "checkpoint.grace_s=300"]


def test_names_that_refer_to_others_change_with_them(overlay: Overlay, tmp_path: Path) -> None:
    """In an overlay that brings a volume of its own."""
    example_of_it = example(overlay.name, tmp_path) | {"namePrefix": "our-"}
    if overlay.name != "cpu-demo":  # has one
        (tmp_path / "volume.yaml").write_text((KUBERAY / "storage/persistentvolumeclaim.yaml").read_text())
        example_of_it["resources"].append("volume.yaml")
    own = rendered(tmp_path, example_of_it)
    (claim,) = (each["metadata"]["name"] for each in own.all_of("PersistentVolumeClaim"))
    assert claim.startswith("our-quatro-ray-runs") and claim.endswith("-mine")
    assert claims(own) == {claim}
    account = own.one("ServiceAccount")["metadata"]["name"]
    assert account.startswith("our-") and {group.pod["serviceAccountName"] for group in own.groups} == {account}
    for service in own.all_of("Service"):
        assert redis_address(own) == f"{service['metadata']['name']}:6379"
        assert service["metadata"]["name"].startswith("our-quatro-ray-redis")


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
