"""The images, built and run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from quatro_ray import load_config
from tests.deploy.images import STORAGE, build, run
from tests.deploy.tools import SHORT, call, needs


@pytest.fixture(scope="session")
def image() -> str:
    needs("images", "buildah", "debootstrap", "podman")
    return build("cpu", deadline_s=3000)


@pytest.mark.timeout(3600)
def test_a_user_without_rights_runs_the_commands(image: str) -> None:
    assert run(image, "id", "-u").strip() == "1000"
    assert "Usage: quatro-ray" in run(image)
    assert "kind: tiny" in run(image, "quatro-ray", "validate", "/opt/quatro_ray/configs/demo.yaml")


def test_what_kuberay_calls_is_there(image: str) -> None:
    run(image, "bash", "-c", "command -v bash python ray wget pgrep pkill bwrap c++")
    assert "2.60.0" in run(image, "ray", "--version")


def test_files_belong_to_root_and_the_package_is_not_a_copy_of_the_checkout(image: str) -> None:
    owned = run(image, "bash", "-c", "find /opt/quatro_ray /usr/local -not -user root | head -3")
    assert owned.strip() == ""
    where = run(image, "python", "-c", "import quatro_ray; print(quatro_ray.__file__)")
    assert where.startswith("/usr/local/lib/python3.11/site-packages/")
    found = run(image, "bash", "-c", "ls -A /opt/quatro_ray")
    assert not {"tests", "benchmarks", "runs", ".git"} & set(found.split())


def test_the_health_check_is_in_the_image_and_is_content_with_a_single_command(image: str) -> None:
    config = json.loads(call("buildah", *STORAGE, "inspect", "--type", "image", image))["Docker"]["config"]
    assert config["Healthcheck"]["Test"] == ["CMD", "/opt/quatro_ray/docker/health_check.sh"]
    run(image, "/opt/quatro_ray/docker/health_check.sh")


@pytest.mark.timeout(1800)
def test_training_in_a_container(image: str, tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    command = ["quatro-ray", "train", "demo", "run.dir=/runs/demo", *SHORT]
    shown = run(image, *command, options=("--shm-size", "1g", "-v", f"{tmp_path}:/runs"), deadline_s=1200)
    assert "step 12/12" in shown
    assert (tmp_path / "demo/metrics.jsonl").stat().st_uid == 1000
    assert load_config(tmp_path / "demo/config.yaml").run.num_steps == 12


@pytest.mark.timeout(7200)
def test_the_image_for_gpus() -> None:
    """Built, and asked for what needs no GPU."""
    needs("cuda-image", "buildah", "debootstrap", "podman")
    image = build("cuda", deadline_s=6000)
    assert run(image, "id", "-u").strip() == "1000"
    run(image, "/opt/quatro_ray/docker/health_check.sh")
    run(image, "bash", "-c", 'command -v ray wget pgrep pkill bwrap c++ && "$CUDA_HOME/bin/nvcc" --version')
    run(image, "python", "-c", "import ctypes; ctypes.CDLL('libibverbs.so.1')")  # NCCL loads it, or uses TCP
    builds = "import torch, vllm, deepspeed; print(torch.version.cuda)"
    assert run(image, "python", "-c", builds, deadline_s=600).split()[-1] != "None"
    assert "together 8 GPU" in run(image, "quatro-ray", "plan", "/opt/quatro_ray/configs/qwen2.5-1.5b-8gpu.yaml")
    with pytest.raises(AssertionError, match=r"cluster\.device=cpu: vLLM 0\.32\.0 is installed in its build for GPUs"):
        run(image, "quatro-ray", "validate", "demo", deadline_s=600)
