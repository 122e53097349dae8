"""Every test that asks for `overlay` runs once for each folder in deploy/kuberay/overlays."""

from __future__ import annotations

import pytest

from tests.unit.deploy.overlays import OVERLAYS, Overlay, render


@pytest.fixture(params=OVERLAYS)
def overlay(request: pytest.FixtureRequest) -> Overlay:
    return Overlay(request.param, render(f"overlays/{request.param}"))
