"""Reads from the metrics of a run what a simulation of it needs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from quatro_ray.config import Config, load_config
from quatro_ray.errors import ConfigError
from quatro_ray.simulation.decoding import EngineSpeed
from quatro_ray.simulation.workload import MeasuredLengths, Workload
from quatro_ray.telemetry.record_types import number
from quatro_ray.telemetry.run_files import Record, records_of, require_run

_LEAST_STEPS = 10
_NUM_ITEMS = 256
_NEEDED = (
    "tokens/trained",
    "time/step_s",
    "time/train_s",
    "time_share/generators/busy",
)
_HISTOGRAM = "rollout/response_tokens_histogram"


@dataclass(frozen=True)
class MeasuredRun:
    """Figures of the later half of a run's steps, without those in which the engines evaluated.

    Attributes:
        config: the run's configuration.
        num_steps: steps that the figures are of.
        lengths: lengths of the trained responses.
        rank_s_per_token: seconds of a learner rank for each trained response token.
        engine_s_per_token: seconds in which an engine was busy for each trained response token.
        pause_s: seconds of a weight update.
        step_s: seconds of a step.
    """

    config: Config
    num_steps: int
    lengths: MeasuredLengths
    rank_s_per_token: float
    engine_s_per_token: float
    pause_s: float
    step_s: float

    def workload(self, iteration_s: float, num_ranks: int) -> Workload:
        """Return the workload for engines of this speed, and ranks that share the tokens of a step evenly."""
        return Workload(
            self.lengths,
            EngineSpeed(iteration_s, sequence_s=0.0, context_s=0.0, max_num_seqs=self.config.generator.max_num_seqs),
            step_s=0.0,
            token_s=self.rank_s_per_token / num_ranks,
            transfer_s=self.pause_s,
            tokens_per_item=max(1, self.lengths.longest // _NUM_ITEMS),
        )


def measure(run_dir: Path) -> MeasuredRun:
    """Read a run, which may still be running.

    Raises:
        ConfigError: the directory holds no run, or one with too few steps or without the metrics that are needed.
    """
    require_run(run_dir)
    steps = [m for m in records_of(run_dir, "metrics.jsonl", Counter()) if _can_be_measured(m)]
    steps = steps[len(steps) // 2 :]
    if len(steps) < _LEAST_STEPS:
        raise ConfigError(
            f"{run_dir}: has {len(steps)} steps that can be measured (the later half, without those in which engines "
            f"evaluate), and {_LEAST_STEPS} are needed; let it run longer, and with this version"
        )
    config = load_config(run_dir / "config.yaml")
    tokens = _sum(steps, "tokens/trained")
    busy_s = sum(m["time/step_s"] * m["time_share/generators/busy"] for m in steps) * config.generator.num_engines
    lengths: Counter[int] = Counter()
    for m in steps:
        lengths.update({int(k): n for k, n in m[_HISTOGRAM].items()})
    return MeasuredRun(
        config,
        len(steps),
        MeasuredLengths(lengths),
        rank_s_per_token=_sum(steps, "time/train_s") * config.learner.num_ranks / tokens,
        engine_s_per_token=busy_s / tokens,
        pause_s=sum(m["time/step_s"] * (number(m, "time_share/generators/paused") or 0.0) for m in steps) / len(steps),
        step_s=_sum(steps, "time/step_s") / len(steps),
    )


def _sum(steps: Sequence[Record], name: str) -> float:
    return float(sum(m[name] for m in steps))


def _can_be_measured(metrics: Record) -> bool:
    has_all = all(number(metrics, name) is not None for name in _NEEDED) and metrics.get(_HISTOGRAM)
    return bool(has_all) and "time_share/generators/evaluate" not in metrics
