"""Whoever ends a run in Kubernetes leaves it the time for a checkpoint."""

from __future__ import annotations

import re

import pytest
import yaml

from quatro_ray.orchestrator import cluster
from tests.unit.deploy.overlays import Overlay

pytestmark = pytest.mark.process

DRAIN = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"


def needed_s(overlay: Overlay) -> float:
    """From SIGTERM to the end of the driver: a step and a checkpoint, then the end of the actors."""
    return overlay.config.checkpoint.grace_s + cluster._SHUTDOWN_S


def test_a_stopped_job_is_not_killed_before_its_checkpoint(overlay: Overlay) -> None:
    if overlay.job is not None:
        environment = yaml.safe_load(overlay.job["runtimeEnvYAML"])["env_vars"]
        assert int(environment["RAY_JOB_STOP_WAIT_TIME_S"]) >= needed_s(overlay)


def test_pods_that_are_deleted_wait_for_it(overlay: Overlay) -> None:
    for group in overlay.groups:
        assert group.pod["terminationGracePeriodSeconds"] >= needed_s(overlay) + 30  # Ray ends too
    for group in overlay.workers:
        drain = float(group.environment[DRAIN])
        assert needed_s(overlay) <= drain < group.pod["terminationGracePeriodSeconds"]


def test_the_driver_is_told_before_ray_and_nothing_else_is(overlay: Overlay) -> None:
    hook = overlay.head.container["lifecycle"]["preStop"]["exec"]["command"]
    pattern = re.search(r"^driver='(.*)'$", hook[-1], re.MULTILINE)
    assert pattern
    command = " ".join(overlay.command)
    assert re.search(pattern[1], f"/usr/local/bin/python3.11 /usr/local/bin/{command}")
    assert not re.search(pattern[1], f"/bin/sh -c {command}")  # Ray kills the driver if its shell dies
    assert not re.search(pattern[1], " ".join(hook))  # or the hook would wait for itself
