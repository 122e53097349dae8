"""SwanLab."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import swanlab

from quatro_ray.telemetry.tracker import Outcome, TrackedRun, Tracker, evaluation_scalars, step_scalars

_STATE = {"finished": "success", "stopped": "aborted", "failed": "crashed"}


class SwanLab(Tracker):
    """Logs to a run of SwanLab; files go to swanlog/ in the run directory unless SWANLAB_LOGDIR is set.

    SwanLab resumes runs only online (SWANLAB_MODE); offline a resumed run has a second folder with the same id. It
    keeps the first value of each step, so steps that are made again after a fall-back show their earlier values.
    """

    def __init__(self) -> None:
        self._run: Any = None

    def on_start(self, run: TrackedRun) -> str:
        """Begin a run, or continue the run with this id; return its id."""
        again = {} if run.id is None else {"id": run.id, "resume": "allow"}
        log_dir = os.environ.get("SWANLAB_LOGDIR") or os.environ.get("SWANLAB_LOG_DIR") or str(run.dir / "swanlog")
        self._run = swanlab.init(
            project=run.project,
            name=run.name,
            config=dict(run.config),
            log_dir=log_dir,
            settings=swanlab.Settings(terminal={"proxy_type": "none"}),  # this process prints nothing of the run
            **again,
        )
        with suppress(ValueError):  # only online runs have a URL
            self.place = self._run.url
        return str(self._run.id)

    def on_step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Log the numbers among the metrics."""
        self._run.log(step_scalars(metrics), step=step)

    def on_evaluation(self, step: int, name: str, result: Mapping[str, Any]) -> None:
        """Log the rates of the evaluation set."""
        self._run.log(evaluation_scalars(name, result), step=step)

    def on_end(self, outcome: Outcome) -> None:
        """Upload the rest. SwanLab shows a run that a signal stopped as aborted, and one that failed as crashed."""
        error = "the run ended with an error" if outcome == "failed" else None
        self._run.finish(state=_STATE[outcome], error=error)
