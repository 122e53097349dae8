"""Duration and throughput of each optimiser step."""

from __future__ import annotations

from collections.abc import Callable, Mapping

_PHASES = ("wait", "train", "sync", "evaluate", "export", "checkpoint")


class StepClock:
    """Measures the time between the records of two consecutive steps.

    Args:
        now: returns seconds.
        seconds: total duration of the learner's phases by name; it grows during the run.
    """

    def __init__(self, now: Callable[[], float], seconds: Mapping[str, float]) -> None:
        self._now = now
        self._seconds = seconds
        self.start(0)

    def start(self, num_generated: int) -> None:
        """Begin the next step. `num_generated`: response tokens generated so far."""
        self._started = self._now()
        self._before = dict(self._seconds)
        self._num_generated = num_generated

    def step(self, *, num_trained: int, num_rollouts: int, num_generated: int) -> dict[str, float]:
        """Return the metrics of the step that ends now, and begin the next one.

        Args:
            num_trained: response tokens that the step trained on.
            num_rollouts: rollouts that it trained on.
            num_generated: response tokens generated so far, in the whole run.
        """
        duration = self._now() - self._started
        metrics = {"time/step_s": duration}
        for name in _PHASES:
            if spent := self._seconds.get(name, 0.0) - self._before.get(name, 0.0):
                metrics[f"time/{name}_s"] = spent
        if duration > 0:
            metrics["throughput/trained_tokens_per_s"] = num_trained / duration
            metrics["throughput/rollouts_per_s"] = num_rollouts / duration
            metrics["throughput/generated_tokens_per_s"] = (num_generated - self._num_generated) / duration
        self.start(num_generated)
        return metrics
