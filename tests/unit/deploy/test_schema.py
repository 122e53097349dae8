"""The API server would take the manifests of KubeRay's kinds as they are, without dropping a field."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from tests.unit.deploy.overlays import Overlay, render
from tests.unit.deploy.schemas import problems

pytestmark = pytest.mark.process


def test_the_manifest_fits_the_definition(overlay: Overlay) -> None:
    assert problems(overlay.ray) == []


def misspell(job: dict[str, Any]) -> None:
    job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["securityContext"]["runAsUsr"] = 1000


def give_a_number(job: dict[str, Any]) -> None:
    job["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] = 0


def leave_out(job: dict[str, Any]) -> None:
    del job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]


def choose_an_unknown_mode(job: dict[str, Any]) -> None:
    job["spec"]["rayClusterSpec"]["authOptions"]["mode"] = "password"


def give_no_quantity(job: dict[str, Any]) -> None:
    worker = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    worker["template"]["spec"]["containers"][0]["resources"]["limits"]["memory"] = "much"


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (misspell, "'runAsUsr' was unexpected"),
        (give_a_number, "0 is not of type 'string'"),
        (leave_out, "'template' is a required property"),
        (choose_an_unknown_mode, "'password' is not one of"),
        (give_no_quantity, "'much' does not match"),
    ],
)
def test_a_wrong_field_is_found(spoil: Callable[[dict[str, Any]], None], said: str) -> None:
    job = copy.deepcopy(Overlay("base", render("base")).ray)
    spoil(job)
    (problem,) = problems(job)
    assert said in problem


def test_defaults_are_filled_in_before_required_fields_are_looked_for() -> None:
    job = copy.deepcopy(Overlay("base", render("base")).ray)
    del job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["minReplicas"]  # required, with a default
    assert problems(job) == []
