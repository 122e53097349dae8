"""The pods hold the actors of the run that they are made for, and what the actors and Ray need besides."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from quatro_ray.actors import shared_memory
from quatro_ray.orchestrator.resources import Bundle, bundles
from tests.unit.deploy.overlays import OVERLAYS, ROOT, Group, Overlay, quantity, render

pytestmark = pytest.mark.process

NAMES = {"CPU": "cpu", "GPU": "nvidia.com/gpu"}
"""Names in Kubernetes of what Ray counts."""


def left_over(plan: list[Bundle], pods: list[Group]) -> list[Bundle]:
    """The bundles for which no pod has room, when each goes to the first pod that has; the largest first."""
    room = [{name: pod.limits.get(NAMES[name], 0.0) for name in NAMES} for pod in pods for _ in range(pod.replicas)]
    left = []
    for bundle in sorted(plan, key=lambda b: (b.resources.get("GPU", 0), b.resources.get("CPU", 0)), reverse=True):
        fits = (free for free in room if all(free[name] + 1e-9 >= need for name, need in bundle.resources.items()))
        if (free := next(fits, None)) is None:
            left.append(bundle)
            continue
        for name, need in bundle.resources.items():
            free[name] -= need
    return left


def test_each_actor_fits_into_a_pod(overlay: Overlay) -> None:
    plan = bundles(overlay.config)
    assert left_over(plan, overlay.workers) == []


def test_no_gpu_is_left_over(overlay: Overlay) -> None:
    need = sum(bundle.resources.get("GPU", 0) for bundle in bundles(overlay.config))
    assert sum(pod.limits.get("nvidia.com/gpu", 0) * pod.replicas for pod in overlay.workers) == need


def test_a_pod_of_the_autoscaler_holds_one_engine(overlay: Overlay) -> None:
    if overlay.is_autoscaled:
        engine = next(bundle for bundle in bundles(overlay.config) if bundle.role == "generator")
        pod = replace(overlay.workers[1], replicas=1)
        assert left_over([engine], [pod]) == [] and left_over([engine, engine], [pod]) == [engine]


def test_an_actor_that_fits_only_into_the_sum_of_pods_is_found() -> None:
    two = Overlay("several-nodes", render("overlays/several-nodes")).workers
    assert left_over([Bundle("generator", 0, {"CPU": 4.0, "GPU": 16.0})], two)
    assert left_over([Bundle("learner", i, {"CPU": 1.0, "GPU": 5.0}) for i in range(3)], two)
    assert not left_over([Bundle("learner", i, {"CPU": 1.0, "GPU": 5.0}) for i in range(2)], two)


def test_requests_equal_limits(overlay: Overlay) -> None:
    containers = [group.container for group in overlay.groups]
    containers += overlay.job["submitterPodTemplate"]["spec"]["containers"] if overlay.job else []
    for redis in overlay.all_of("StatefulSet"):
        containers += redis["spec"]["template"]["spec"]["containers"]
    for container in containers:
        requests, limits = container["resources"]["requests"], container["resources"]["limits"]
        if overlay.name == "cpu-demo":  # its pods share a laptop with those of Kubernetes
            assert quantity(requests["cpu"]) <= quantity(limits["cpu"])
            requests = requests | {"cpu": limits["cpu"]}
        assert requests == limits


def test_the_demo_fits_beside_the_pods_of_kubernetes_on_four_cpus() -> None:
    overlay = Overlay("cpu-demo", render("overlays/cpu-demo"))
    assert overlay.job is not None
    containers = [group.container for group in overlay.groups]
    containers += overlay.job["submitterPodTemplate"]["spec"]["containers"]
    assert sum(quantity(each["resources"]["requests"]["cpu"]) for each in containers) <= 4 - 1.05


def test_one_gpu_fits_on_a_machine_of_8_cpus_and_32_gib() -> None:
    """Beside the pods of Kubernetes and what a kubelet keeps for itself: usual sizes with one GPU of 24 GB."""
    (worker,) = Overlay("one-gpu", render("overlays/one-gpu")).workers
    assert worker.limits["cpu"] <= 8 - 0.5 and worker.limits["memory"] <= (32 - 4) * 2**30


def test_pods_with_gpus_tolerate_their_nodes_taint(overlay: Overlay) -> None:
    for group in overlay.groups:
        keys = [each["key"] for each in group.pod.get("tolerations", [])]
        assert keys == (["nvidia.com/gpu"] if "nvidia.com/gpu" in group.limits else [])


def test_shared_memory_holds_the_object_store_and_what_quatro_ray_needs(overlay: Overlay) -> None:
    for group in overlay.groups:
        (name,) = (m["name"] for m in group.container["volumeMounts"] if m["mountPath"] == "/dev/shm")
        (volume,) = (v["emptyDir"] for v in group.pod["volumes"] if v["name"] == name)
        assert volume["medium"] == "Memory"
        store = int(group.start_params["object-store-memory"])
        assert quantity(volume["sizeLimit"]) >= store + shared_memory._NEEDED_MIB * 2**20
        assert quantity(volume["sizeLimit"]) <= group.limits["memory"] / 2  # it counts as memory of the pod


def test_all_pods_share_the_run_directory(overlay: Overlay) -> None:
    claims = set()
    for group in overlay.groups:
        mounted = {mount["name"]: mount["mountPath"] for mount in group.container["volumeMounts"]}
        assert set(mounted) == {volume["name"] for volume in group.pod["volumes"]}
        claims |= {v["persistentVolumeClaim"]["claimName"] for v in group.pod["volumes"] if v["name"] == "runs"}
        assert overlay.config.run.dir.is_relative_to(mounted["runs"])
        assert group.environment["HF_HOME"].startswith(mounted["runs"])
    (name,) = claims
    defined = [*render("storage"), *overlay.all_of("PersistentVolumeClaim")]
    (mode,) = {claim["metadata"]["name"]: claim for claim in defined}[name]["spec"]["accessModes"]
    num_workers = sum(group.replicas for group in overlay.workers)
    assert mode == "ReadWriteMany" or (mode == "ReadWriteOnce" and num_workers == 1 and overlay.name == "cpu-demo")


def test_the_table_in_the_documents_has_each_overlay_with_its_gpus() -> None:
    rows = re.findall(r"^\| `([\w-]+)` \|.*\| (\d+) \|$", (ROOT / "docs/kuberay.md").read_text(), re.MULTILINE)
    gpus = dict.fromkeys(OVERLAYS, 0.0)
    for name in OVERLAYS:
        for pod in Overlay(name, render(f"overlays/{name}")).workers:
            gpus[name] += pod.limits.get("nvidia.com/gpu", 0) * pod.replicas
    assert sorted((name, float(number)) for name, number in rows) == sorted(gpus.items())
