"""Rules of KubeRay 1.7 that its definitions do not encode, and its conventions."""

from __future__ import annotations

import re

import pytest
import yaml

from tests.unit.deploy.locks import locked
from tests.unit.deploy.overlays import Overlay, redis_address

pytestmark = pytest.mark.process

ALPHA = {"networkPolicy", "tlsOptions", "historyServerOptions"}
"""Fields that the operator ignores unless a feature gate, off by default, is on."""
_NO_RIGHTS = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def test_names(overlay: Overlay) -> None:
    name = overlay.ray["metadata"]["name"]
    assert len(name) <= 47 and re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name)
    assert name.endswith(overlay.name)


def test_ray_is_the_one_of_the_locks(overlay: Overlay) -> None:
    assert overlay.cluster["rayVersion"] == locked("ray", "cuda") == locked("ray", "cpu")


def test_fields_that_exclude_or_need_each_other(overlay: Overlay) -> None:
    if overlay.job is None:
        assert "suspend" not in overlay.ray["spec"]
        return
    assert overlay.job["shutdownAfterJobFinishes"] or "ttlSecondsAfterFinished" not in overlay.job
    assert overlay.job["preRunningDeadlineSeconds"] == 3600  # pods that find no node do not wait for ever
    assert "deletionStrategy" not in overlay.job and "clusterSelector" not in overlay.job
    assert overlay.job["submissionMode"] == "K8sJobMode"


def test_no_two_clusters_write_into_one_run(overlay: Overlay) -> None:
    if overlay.job is not None:
        assert overlay.job["backoffLimit"] == 0
    assert overlay.config.run.resume == "auto" and not overlay.config.run.overwrite


def test_ray_asks_for_its_token(overlay: Overlay) -> None:
    assert overlay.cluster["authOptions"] == {"mode": "token"}  # KubeRay makes a Secret for each cluster
    assert tuple(int(part) for part in overlay.cluster["rayVersion"].split(".")) >= (2, 52)
    assert not overlay.all_of("Secret")


def test_nothing_depends_on_a_feature_gate(overlay: Overlay) -> None:
    assert not ALPHA & set(overlay.cluster)
    assert overlay.cluster.get("gcsFaultToleranceOptions", {}).get("backend", "redis") == "redis"


def test_containers_have_their_names_and_run_as_a_user(overlay: Overlay) -> None:
    assert overlay.head.container["name"] == "ray-head"
    assert {group.container["name"] for group in overlay.workers} == {"ray-worker"}
    for group in overlay.groups:
        assert group.pod["securityContext"]["runAsUser"] == 1000  # the user of the image
        assert group.container["securityContext"] == _NO_RIGHTS


def test_the_head_runs_no_actors(overlay: Overlay) -> None:
    assert overlay.head.start_params["num-cpus"] == "0"
    assert overlay.head.start_params["dashboard-host"] == "0.0.0.0"  # operator and submitter are in other pods
    assert "nvidia.com/gpu" not in overlay.head.limits


def test_the_number_of_workers_is_fixed_but_for_that_of_elastic_engines(overlay: Overlay) -> None:
    assert overlay.is_autoscaled == (overlay.name == "elastic") == ("autoscalerOptions" in overlay.cluster)
    first, *others = overlay.workers
    assert first.spec["minReplicas"] == first.spec["replicas"] == first.spec["maxReplicas"] >= 1
    assert len(others) == overlay.is_autoscaled
    for group in others:
        assert group.spec["groupName"] == "engines" and group.spec["minReplicas"] == group.spec["replicas"] == 0
        generator = overlay.config.generator
        assert group.spec["maxReplicas"] == generator.max_num_engines - generator.num_engines


def test_the_autoscaler_is_the_one_of_ray_and_has_no_rights_in_its_container(overlay: Overlay) -> None:
    if overlay.is_autoscaled:
        options = overlay.cluster["autoscalerOptions"]
        assert options["version"] == "v2"
        assert options["securityContext"] == _NO_RIGHTS
        assert options["resources"]["requests"] == options["resources"]["limits"]


def test_only_kueue_has_a_queue(overlay: Overlay) -> None:
    queue = overlay.ray["metadata"]["labels"].get("kueue.x-k8s.io/queue-name")
    assert (queue is not None) == (overlay.name == "kueue")
    assert "suspend" not in overlay.ray["spec"]  # applied again, it would suspend a job that runs
    assert len(overlay.workers) <= 6  # of Kueue's eight sets of pods, head and submitter are two


def test_redis_is_named_where_kuberay_wants_it(overlay: Overlay) -> None:
    names = {name for group in overlay.groups for name in group.environment}
    assert not {"RAY_REDIS_ADDRESS", "REDIS_PASSWORD", "REDIS_USERNAME"} & names
    assert not {"redis-password", "redis-username"} & set(overlay.head.start_params)
    assert not any(key.startswith("ray.io/") for key in overlay.ray["metadata"].get("annotations", {}))
    options = overlay.cluster.get("gcsFaultToleranceOptions")
    assert (options is not None) == bool(overlay.all_of("Service")) == (overlay.name == "fault-tolerant-gcs")
    if options is None:
        return
    (service,), (redis,) = overlay.all_of("Service"), overlay.all_of("StatefulSet")
    (port,) = service["spec"]["ports"]
    assert redis_address(overlay) == f"{service['metadata']['name']}:{port['port']}"
    (container,) = redis["spec"]["template"]["spec"]["containers"]
    assert {"name": "REDIS_PASSWORD", **options["redisPassword"]} in container["env"]
    assert service["spec"]["selector"].items() <= redis["spec"]["template"]["metadata"]["labels"].items()
    assert redis["spec"]["volumeClaimTemplates"], "a Redis that forgets its data is none"


def test_the_runtime_environment_is_yaml(overlay: Overlay) -> None:
    if overlay.job is not None:
        assert set(yaml.safe_load(overlay.job["runtimeEnvYAML"])) == {"env_vars"}
