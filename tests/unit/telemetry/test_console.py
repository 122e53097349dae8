"""The progress line."""

from __future__ import annotations

import errno
import io
from typing import Any

from rich.console import Console

from quatro_ray.telemetry.console import Progress


def test_it_tells_how_long_learner_and_engines_had_nothing_to_do() -> None:
    shown = io.StringIO()
    metrics: dict[str, Any] = {
        "reward/mean": 0.5,
        "policy/entropy": 1.0,
        "policy/realised_kl_nats": [0.5],
        "off_policy/staleness_mean": 2.0,
        "off_policy/staleness_max": 3,
        "step/skipped": 0.0,
        "time/step_s": 4.0,
        "time_share/learner/wait": 0.25,
        "time_share/learner/idle": 0.05,
        "time_share/learner/train": 0.7,
        "time_share/generators/busy": 1.0,
    }
    Progress(Console(file=shown, width=200)).step(1, 9, metrics, 12.0)
    assert shown.getvalue().rstrip().endswith("(max 3)  idle: learner 30%, engines 0%  12 s")


def test_a_terminal_that_is_gone_is_no_error() -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.EIO, "Input/output error")

    Progress(Console(file=Gone())).say("a message")
