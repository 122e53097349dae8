"""Exports a run's metrics through Ray's metrics agent, which every node has and which Prometheus scrapes."""

from __future__ import annotations

from collections.abc import Callable
from threading import Event, Thread

import ray
from ray.util.metrics import Gauge

from quatro_ray.config import Config
from quatro_ray.telemetry.prometheus_names import FAMILIES, MAX_STALENESS, NUM_ENGINES, NUM_STEPS
from quatro_ray.telemetry.run_gauges import RunGauges
from quatro_ray.telemetry.tracker import Outcome

_EVERY_S = 1.0
"""Ray sends each value once and forgets it after two reports (20 s; 2 s at the least), so values are set again."""
_END_S = 5.0


class PrometheusExport(RunGauges):
    """Sets one gauge of Ray for each family, again and again until the run ends; Ray must be connected.

    Counts are gauges too: Ray's Counter cannot begin at 0, so `increase()` would miss the first loss of an engine.
    """

    def __init__(self, config: Config) -> None:
        settings = {
            NUM_STEPS: config.run.num_steps,
            MAX_STALENESS: config.replay.max_staleness,
            NUM_ENGINES: config.generator.num_engines,
        }
        super().__init__(settings)
        self._gauges = {
            family.name: (Gauge(family.name, family.text, tag_keys=("run", *family.labels)), family.labels)
            for family in FAMILIES
        }
        self._run = config.run.dir.name
        self._has_ended = Event()
        self._thread = Thread(target=self._keep_sending, name="prometheus", daemon=True)
        self._thread.start()

    def _keep_sending(self) -> None:
        self.send()
        while not self._has_ended.wait(_EVERY_S):
            self.send()

    def send(self) -> None:
        """Give the values to Ray, which sends them to the agent of this node."""
        for series, value in self.values().items():
            gauge, labels = self._gauges[series.name]
            gauge.set(value, {"run": self._run, **dict(zip(labels, series.labels, strict=True))})

    def on_end(self, outcome: Outcome) -> None:
        """Set the last values, which Ray sends when it disconnects."""
        self._has_ended.set()
        self._thread.join(_END_S)
        self.send()


def export_metrics(config: Config, note: Callable[[str], None]) -> PrometheusExport:
    """Begin to export, and note where Prometheus finds the metrics."""
    own = ray.get_runtime_context().get_node_id()
    (port,) = [node["MetricsExportPort"] for node in ray.nodes() if node["NodeID"] == own]
    url = f"http://{ray.util.get_node_ip_address()}:{port}/metrics"
    note(f"metrics for Prometheus: {url if port > 0 else 'none, because Ray collects no metrics on this node'}")
    return PrometheusExport(config)
