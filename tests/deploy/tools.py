"""What these tests need from the machine. What it cannot do is left out only if WITHOUT names it."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WORK = ROOT / "build/deploy"
"""What is slow to make and does not change: the stand-in base and the layers of images."""
SHORT = [
    "run.num_steps=12",
    "learner.num_ranks=1",
    "model.warmup.target_pass_rate=0.05",
    "evaluation.samples_per_query=8",
]
"""Overrides that make the demo short."""
WITHOUT = set(os.environ.get("WITHOUT", "").split())


def needs(part: str, *commands: str) -> None:
    """Fail if a command is missing; skip if the caller of `make test-deploy` leaves this part out."""
    if part in WITHOUT:
        pytest.skip(f"left out by WITHOUT={part}")
    if missing := [command for command in commands if shutil.which(command) is None]:
        pytest.fail(
            f"missing: {', '.join(missing)}; install them (docs/development.md lists the packages), or leave these "
            f"tests out: make test-deploy WITHOUT={part}"
        )


def call(*command: str | Path, deadline_s: float = 120, **options: object) -> str:
    """Run a command and return its output; the output of one that fails is in the error."""
    done = subprocess.run(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=deadline_s,
        **options,  # type: ignore[call-overload]
    )
    output = str(done.stdout)
    assert done.returncode == 0, f"{command} ended with status {done.returncode}:\n{output[-8000:]}"
    return output
