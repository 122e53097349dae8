"""Weights & Biases."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import wandb

from quatro_ray.telemetry.tracker import Outcome, TrackedRun, Tracker, evaluation_scalars, step_scalars

_STEP = "train/step"


class WeightsAndBiases(Tracker):
    """Logs to a run of Weights & Biases; files go to wandb/ in the run directory unless WANDB_DIR is set.

    The step of the charts is the metric `train/step`, because W&B's own step refuses to go backwards, as it must after
    a fall-back and for evaluations beside training. After a fall-back a chart has both values of the steps that were
    made again; the later one has the later time.
    """

    def __init__(self) -> None:
        self._run: Any = None

    def on_start(self, run: TrackedRun) -> str:
        """Begin a run, or continue the run with this id; return its id."""
        self._run = wandb.init(
            project=run.project,
            name=run.name,
            id=run.id,
            resume="allow",
            config=dict(run.config),
            allow_val_change=True,
            dir=os.environ.get("WANDB_DIR", str(run.dir)),
            settings=wandb.Settings(console="off"),  # this process prints nothing of the run
        )
        self._run.define_metric(_STEP)
        self._run.define_metric("*", step_metric=_STEP)
        self.place = self._run.settings.sync_dir if self._run.offline else (self._run.url or "")
        return str(self._run.id)

    def on_step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Log the numbers among the metrics."""
        self._run.log({_STEP: step, **step_scalars(metrics)})

    def on_evaluation(self, step: int, name: str, result: Mapping[str, Any]) -> None:
        """Log the rates of the evaluation set."""
        self._run.log({_STEP: step, **evaluation_scalars(name, result)})

    def on_end(self, outcome: Outcome) -> None:
        """Upload the rest. W&B shows a run that a signal stopped as preempted, and one that failed as failed."""
        if outcome == "stopped":
            self._run.mark_preempting()
        self._run.finish(exit_code=0 if outcome == "finished" else 1)
