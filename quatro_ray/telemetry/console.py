"""A progress line that people can read at a glance: updated in place on a terminal, one every few seconds elsewhere."""

from __future__ import annotations

import errno
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

from rich.console import Console
from rich.status import Status

from quatro_ray.telemetry.activity import IDLE
from quatro_ray.telemetry.evaluation_result import EvaluationResult
from quatro_ray.types import StepMetrics

_SECONDS_BETWEEN_LINES = 5.0


class Progress:
    """The terminal output of a run in progress.

    Args:
        console: where to print; by default stdout.
        in_place: update the line in place if the console is a terminal. Log messages on stderr would break such a line.
    """

    def __init__(self, console: Console | None = None, *, in_place: bool = True) -> None:
        self._console = console or Console(highlight=False, soft_wrap=True)
        self._in_place = in_place and self._console.is_terminal
        self._status: Status | None = None
        self._printed_at = -_SECONDS_BETWEEN_LINES

    def step(self, step: int, num_steps: int, metrics: StepMetrics, elapsed_s: float) -> None:
        """Show the progress line after an optimiser step; off a terminal at most one every few seconds."""
        kl = cast(list[float], metrics["policy/realised_kl_nats"])
        line = (
            f"step {step}/{num_steps}  reward {metrics['reward/mean']:.3f}  entropy {metrics['policy/entropy']:.2f}  "
            f"KL {sum(kl) / len(kl):.3f}  staleness {metrics['off_policy/staleness_mean']:.1f} "
            f"(max {metrics['off_policy/staleness_max']})  {_idle(metrics)}{elapsed_s:.0f} s"
        )
        if metrics["step/skipped"]:
            self.say(f"step {step}: loss or gradient not finite, update skipped")
        if self._in_place:
            with self._while_it_lasts():
                if self._status is None:
                    self._status = self._console.status(line)
                    self._status.start()
                self._status.update(line)
        elif step == num_steps or time.monotonic() - self._printed_at >= _SECONDS_BETWEEN_LINES:
            self._printed_at = time.monotonic()
            with self._while_it_lasts():
                self._console.print(line)

    def evaluation(self, result: EvaluationResult) -> None:
        """Print the result of one evaluation set."""
        self.say(f"version {result.version}: {result.line()}")

    def say(self, message: str) -> None:
        """Print a message on a line of its own."""
        with self._while_it_lasts():
            self._console.print(message, markup=False)  # text in brackets would be taken for markup

    @contextmanager
    def _while_it_lasts(self) -> Iterator[None]:
        """Let the terminal be closed: SIGHUP, which ends the run in order, may come after the first failed write."""
        try:
            yield
        except OSError as error:
            if error.errno != errno.EIO:
                raise

    def close(self) -> None:
        """Remove the line that is updated in place."""
        if self._status is not None:
            with self._while_it_lasts():
                self._status.stop()


def _idle(metrics: StepMetrics) -> str:
    """Return the shares of the step in which learner and engines had nothing to do; empty if they are not known."""
    learner, engines = (
        sum(cast(float, metrics.get(f"time_share/{role}/{state}", 0.0)) for state in ("wait", IDLE))
        for role in ("learner", "generators")
    )
    return f"idle: learner {learner:.0%}, engines {engines:.0%}  " if "time/step_s" in metrics else ""
