"""Trackio: a database on this machine, a server of its own, or a Hugging Face Space."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import trackio

from quatro_ray.telemetry.tracker import Outcome, TrackedRun, Tracker, evaluation_scalars, step_scalars


class Trackio(Tracker):
    """Logs to a run of Trackio; TRACKIO_SPACE_ID, TRACKIO_SERVER_URL or TRACKIO_DIR says where.

    Trackio continues the newest run of a name, so two runs of one project should not have the same name. After a
    fall-back it keeps both values of the steps that were made again; the later one has the later time.
    """

    def __init__(self) -> None:
        self._run: Any = None

    def on_start(self, run: TrackedRun) -> str:
        """Begin a run, or continue the newest run of this name; return the name."""
        self._run = trackio.init(
            project=run.project,
            name=run.id or run.name,
            resume="never" if run.id is None else "allow",
            config=dict(run.config),
            embed=False,
        )
        self.place = self._run.url or f'trackio show --project "{run.project}"'
        return str(self._run.name)

    def on_step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Log the numbers among the metrics."""
        self._run.log(step_scalars(metrics), step=step)

    def on_evaluation(self, step: int, name: str, result: Mapping[str, Any]) -> None:
        """Log the rates of the evaluation set."""
        self._run.log(evaluation_scalars(name, result), step=step)

    def on_end(self, outcome: Outcome) -> None:
        """Write or upload the rest; Trackio does not record how a run ended."""
        self._run.finish()
