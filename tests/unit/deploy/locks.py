"""Versions in the locks."""

from __future__ import annotations

import re

from tests.unit.deploy.overlays import ROOT


def locked(name: str, lock: str) -> str:
    found = re.search(rf"^{name}==(\S+)", (ROOT / f"locks/{lock}.txt").read_text(), re.MULTILINE)
    assert found, f"{name} is not in locks/{lock}.txt"
    return found[1]
