"""The values that Prometheus gets for a run; orchestrator/prometheus.py exports them through Ray."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from threading import Lock

from quatro_ray.telemetry.prometheus_names import (
    DROPS,
    EVENTS,
    LAST_STEP,
    OF_STEPS,
    STEP,
    Family,
    Series,
    numbers,
    series_of,
)
from quatro_ray.telemetry.tracker import Tracker
from quatro_ray.types import DropReason

_PARTS = {"generator", "learner", "node", "checkpoint", "ledger", "evaluation"}
_OTHER = "other"
"""The part of an event that concerns anything else, such as a damaged file."""
_EVENTS_FROM_ZERO = (
    ("lost", "generator"),
    ("recovered", "generator"),
    ("given_up", "generator"),
    ("joined", "generator"),
    ("lost", "learner"),
    ("recovered", "learner"),
    ("fell_back", "learner"),
    ("failed", "checkpoint"),
    ("draining", "node"),
)
_ADDED = {family.name for family in OF_STEPS if family.is_added}


class RunGauges(Tracker):
    """The current value of each series. The methods may be called from several threads.

    A metric that a step lacks has no series until a later step has it. Counts begin at 0 with this process, so that
    Prometheus sees the first increment as one: `increase()` takes the first value of a series as its start.

    Args:
        settings: values that do not change, by family.
        clock: returns the Unix time in seconds.
    """

    def __init__(self, settings: Mapping[Family, float], clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._lock = Lock()
        self._of_step: dict[Series, float] = {}
        self._of_evaluations: dict[Series, float] = {}
        self._others = {Series(family.name): float(value) for family, value in settings.items()}
        self._counts = {Series(DROPS.name, (str(reason),)): 0.0 for reason in DropReason}
        self._counts |= {Series(EVENTS.name, labels): 0.0 for labels in _EVENTS_FROM_ZERO}
        self._at(0)

    def _at(self, step: int) -> None:
        self._others |= {Series(STEP.name): float(step), Series(LAST_STEP.name): self._clock()}

    def on_step(self, step: int, metrics: Mapping[str, object]) -> None:
        """Replace the values of the step before, and add to the counts."""
        found = {series: value for name, value in numbers(metrics) if (series := series_of(name))}
        with self._lock:
            self._of_step = {series: value for series, value in found.items() if series.name not in _ADDED}
            for series in found.keys() - self._of_step.keys():
                self._counts[series] = self._counts.get(series, 0.0) + found[series]
            self._at(step)

    def on_evaluation(self, step: int, name: str, result: Mapping[str, object]) -> None:
        """Replace the values of the set."""
        named = {f"eval/{name}/{field}": value for field, value in result.items()}
        found = {series: value for name, value in numbers(named) if (series := series_of(name))}
        with self._lock:
            self._of_evaluations |= found

    def on_event(self, event: str, part: str) -> None:
        """Count the event; `generator 3` counts as generator."""
        kind = part.partition(" ")[0]
        series = Series(EVENTS.name, (event, kind if kind in _PARTS else _OTHER))
        with self._lock:
            self._counts[series] = self._counts.get(series, 0.0) + 1

    def on_rewind(self, step: int) -> None:
        """Return to an earlier step."""
        with self._lock:
            self._at(step)

    def values(self) -> dict[Series, float]:
        """Return the value of each series."""
        with self._lock:
            return {**self._others, **self._of_step, **self._of_evaluations, **self._counts}
