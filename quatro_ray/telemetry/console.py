"""One line that people can read at a glance: kept in place on a terminal, one every few seconds elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.status import Status

from quatro_ray.types import EvaluationResult

_SECONDS_BETWEEN_LINES = 5.0


class Progress:
    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False, soft_wrap=True)
        self._status: Status | None = None
        self._printed_at = -_SECONDS_BETWEEN_LINES

    def step(self, step: int, num_steps: int, metrics: Mapping[str, Any], elapsed_s: float) -> None:
        kl = metrics["policy/realised_kl_nats"]
        line = (
            f"step {step}/{num_steps}  reward {metrics['reward/mean']:.3f}  entropy {metrics['policy/entropy']:.2f}  "
            f"KL {sum(kl) / len(kl):.3f}  staleness {metrics['off_policy/staleness_mean']:.1f} "
            f"(max {metrics['off_policy/staleness_max']})  {elapsed_s:.0f} s"
        )
        if metrics["step/skipped"]:
            self.say(f"step {step}: loss or gradient not finite, update skipped")
        if self._console.is_terminal:
            if self._status is None:
                self._status = self._console.status(line)
                self._status.start()
            self._status.update(line)
        elif step == num_steps or time.monotonic() - self._printed_at >= _SECONDS_BETWEEN_LINES:
            self._printed_at = time.monotonic()
            self._console.print(line)

    def evaluation(self, result: EvaluationResult) -> None:
        self.say(f"version {result.version}: {result.line()}")

    def say(self, message: str) -> None:
        self._console.print(message, markup=False)  # a message may hold what looks like it

    def close(self) -> None:
        if self._status is not None:
            self._status.stop()
