"""The interface of everything that follows a run: experiment trackers, and callbacks of users (docs/trackers.md)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

Outcome = Literal["finished", "stopped", "failed"]
"""How a run ended: its last step is done, a signal stopped it, or an error did."""


@dataclass(frozen=True)
class TrackedRun:
    """Facts about a run, given to a tracker when it starts.

    Attributes:
        project: `telemetry.project`.
        name: `telemetry.run_name`, or the name of the run directory.
        dir: the run directory.
        config: the resolved configuration, without what may be secret.
        id: what `on_start` returned when the run began, if it is resumed now; None for a new run.
    """

    project: str
    name: str
    dir: Path
    config: Mapping[str, Any]
    id: str | None = None


class Tracker:
    """Follows a run. Each method does nothing here; a subclass has those that it needs.

    Attributes:
        place: where people find the run, such as a URL; shown once, after `on_start`. Empty: nothing is shown.
    """

    place: str = ""

    def on_start(self, run: TrackedRun) -> str | None:
        """Begin a run, or continue it if `run.id` is set; return the id by which it can be continued later."""

    def on_step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Take the metrics of an optimiser step, as metrics.jsonl has them: numbers, None, lists, and histograms."""

    def on_evaluation(self, step: int, name: str, result: Mapping[str, Any]) -> None:
        """Take the result of the evaluation set `name`, as evaluations.jsonl has it.

        With `evaluation.num_engines`, later steps may have been taken already.
        """

    def on_checkpoint(self, step: int, path: str) -> None:
        """Learn of a complete checkpoint. It may be deleted again after `checkpoint.keep` others."""

    def on_rewind(self, step: int) -> None:
        """Learn that the policy fell back to this step; later steps are made and recorded again."""

    def on_end(self, outcome: Outcome) -> None:
        """End the run; the last call."""


def step_scalars(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers among the metrics of a step, by name, and the means of lists of numbers as `NAME_mean`.

    Such a list has a value per query. Histograms, which count in integers, are left out.
    """
    scalars = {name: float(value) for name, value in metrics.items() if isinstance(value, int | float)}
    for name, values in metrics.items():
        if isinstance(values, list) and values and all(isinstance(value, float) for value in values):
            scalars[f"{name}_mean"] = fmean(values)
    return scalars


def evaluation_scalars(name: str, result: Mapping[str, Any]) -> dict[str, float]:
    """Return the rates of an evaluation set by name, such as `eval/gsm8k/pass_at_1`."""
    return {f"eval/{name}/{key}": value for key, value in result.items() if isinstance(value, float)}
