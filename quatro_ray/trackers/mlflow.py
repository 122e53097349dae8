"""MLflow: a tracking server, or a store on the disk."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Mapping
from typing import Any

import mlflow
from mlflow.entities import Metric, Param

from quatro_ray.telemetry.tracker import Outcome, TrackedRun, Tracker, evaluation_scalars, step_scalars

_NOT_ALLOWED = re.compile(r"[^\w\-. :/]")
_MAX_VALUE_CHARS = 500
_MAX_PARAMS = 100
"""Limits of older servers for the text of a parameter, and for the parameters in one request."""
_STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


class MLflow(Tracker):
    """Logs to a run of MLflow, whose experiment is the project; MLFLOW_TRACKING_URI says where.

    After a fall-back MLflow keeps both values of the steps that were made again; the later one has the later time.
    Parameters cannot be changed in MLflow, so those of a resumed run stay those with which it began.
    """

    def __init__(self) -> None:
        self._client: Any = None
        self._id = ""

    def on_start(self, run: TrackedRun) -> str:
        """Begin a run with the configuration as parameters, or continue the run with this id; return its id."""
        self._client = mlflow.MlflowClient()
        if run.id is None:
            experiment = mlflow.set_experiment(run.project).experiment_id
            self._id = self._client.create_run(experiment, run_name=run.name).info.run_id
            params = [Param(_allowed(name), value) for name, value in _leaves("", run.config)]
            for start in range(0, len(params), _MAX_PARAMS):
                self._client.log_batch(self._id, params=params[start : start + _MAX_PARAMS])
        else:
            self._id = run.id
            self._client.update_run(self._id, status="RUNNING")
        self.place = f"{mlflow.get_tracking_uri()}, run {self._id}"
        return self._id

    def on_step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Log the numbers among the metrics."""
        self._log(step, step_scalars(metrics))

    def on_evaluation(self, step: int, name: str, result: Mapping[str, Any]) -> None:
        """Log the rates of the evaluation set."""
        self._log(step, evaluation_scalars(name, result))

    def on_end(self, outcome: Outcome) -> None:
        """Set the run's status: finished, killed if a signal stopped it, or failed."""
        self._client.set_terminated(self._id, _STATUS[outcome])

    def _log(self, step: int, scalars: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        self._client.log_batch(self._id, metrics=[Metric(_allowed(k), v, now, step) for k, v in scalars.items()])


def _allowed(name: str) -> str:
    """Replace what MLflow does not allow in the name of a metric or parameter."""
    return _NOT_ALLOWED.sub("_", name)


def _leaves(path: str, value: object) -> Iterator[tuple[str, str]]:
    """Yield path and text of every value in the configuration."""
    if isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from _leaves(f"{path}.{name}" if path else str(name), inner)
    else:
        yield path, (value if isinstance(value, str) else json.dumps(value))[:_MAX_VALUE_CHARS]
