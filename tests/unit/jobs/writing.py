"""Runs tests/unit/jobs/writing_run.py in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def writing(run_dir: Path) -> Iterator[subprocess.Popen[str]]:
    """Start a process that writes a run, and wait for its first step; it is killed at the end."""
    command = [sys.executable, "-m", "tests.unit.jobs.writing_run", str(run_dir)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        steps_made(process)
        yield process
    finally:
        process.kill()
        process.communicate(timeout=60)


def steps_made(process: subprocess.Popen[str]) -> int:
    """Wait for the next line about a step, and return its number."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("made "):
            return int(line.split()[1])
    raise AssertionError("the process ended before it made a step")
