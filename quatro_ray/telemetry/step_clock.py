"""Duration and throughput of each optimiser step, and where the time of each role went."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from quatro_ray.telemetry.activity import CONTROLLER, IDLE, Activity, shares


class StepClock:
    """Measures the time between the records of two consecutive steps.

    Args:
        now: returns seconds.
        roles: the activity of each role; that of "learner" has the phases of a step.
    """

    def __init__(self, now: Callable[[], float], roles: Mapping[str, Activity]) -> None:
        self._now = now
        self._roles = roles
        self.start(0)

    def start(self, num_generated: int) -> None:
        """Begin the next step. `num_generated`: response tokens generated so far."""
        self._started = self._now()
        self._before = {role: activity.seconds() for role, activity in self._roles.items()}
        self._num_generated = num_generated

    def step(self, *, num_trained: int, num_rollouts: int, num_generated: int) -> dict[str, float]:
        """Return the metrics of the step that ends now, and begin the next one.

        Args:
            num_trained: response tokens that the step trained on.
            num_rollouts: rollouts that it trained on.
            num_generated: response tokens generated so far, in the whole run.
        """
        duration = self._now() - self._started
        metrics = {"time/step_s": duration} | self._phases() | self._shares()
        if duration > 0:
            metrics["throughput/trained_tokens_per_s"] = num_trained / duration
            metrics["throughput/rollouts_per_s"] = num_rollouts / duration
            metrics["throughput/generated_tokens_per_s"] = (num_generated - self._num_generated) / duration
        self.start(num_generated)
        return metrics

    def _phases(self) -> dict[str, float]:
        before = self._before["learner"]
        spent = {name: s - before.get(name, 0.0) for name, s in self._roles["learner"].seconds().items()}
        return {f"time/{name}_s": s for name, s in spent.items() if s > 0 and name != IDLE}

    def _shares(self) -> dict[str, float]:
        roles = {role: activity for role, activity in self._roles.items() if role != CONTROLLER}
        found = {role: shares(activity.seconds(), self._before.get(role)) for role, activity in roles.items()}
        return {f"time_share/{role}/{state}": s for role, states in found.items() for state, s in states.items()}
