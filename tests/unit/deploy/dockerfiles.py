"""The Dockerfiles, and the names of the images that they make."""

from __future__ import annotations

import re

from tests.unit.deploy.overlays import ROOT

DOCKERFILES = {"cuda": ROOT / "docker/Dockerfile", "cpu": ROOT / "docker/Dockerfile.cpu"}


def tag_of(device: str) -> str:
    """The name that the comment at the top of a Dockerfile gives the image."""
    found = re.search(r"docker build .* -t (\S+) \.", DOCKERFILES[device].read_text())
    assert found
    return found[1]
