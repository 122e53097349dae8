"""Advises how to split devices between engines and learner ranks, from a short run and simulations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from quatro_ray.config import Config
from quatro_ray.errors import ConfigError
from quatro_ray.simulation.measured import MeasuredRun, measure
from quatro_ray.simulation.ring import Simulated, simulate
from quatro_ray.telemetry.activity import IDLE

_MOST_OPTIONS = 9
_MOST_GROUPS = 4000
_NUM_STEPS = 40
_TRIES = 6
_CLOSE = 0.01


@dataclass(frozen=True)
class Split:
    """A number of engines and of learner ranks on the same devices, and what its simulation says."""

    num_engines: int
    num_ranks: int
    found: Simulated


def advise(config: Config, run_dir: Path) -> Iterator[str]:
    """Yield the lines of the advice, each when it is known.

    The learner's ranks are taken to share its work evenly, and an engine to take the same time for an iteration however
    many sequences it decodes, which holds up to `generator.max_num_seqs` where reading the weights takes most of it.

    Args:
        config: the configuration that is planned; its devices are those of its engines and ranks.
        run_dir: a run with the same model, data and kind of device, however few of them.

    Raises:
        ConfigError: the run cannot be measured, or engines and ranks share devices.
    """
    if config.cluster.colocate:
        raise ConfigError(
            "cluster.colocate=true: engines and ranks share all devices, and nothing can be split: leave out --simulate"
        )
    measured = measure(run_dir)
    yield f"from {measured.num_steps} steps of {run_dir}:"
    iteration_s, itself = fit(measured)
    yield (
        f"  learner {1e6 * measured.rank_s_per_token:.4g} µs a token and rank, weight update {measured.pause_s:.3g} s, "
        f"engine {1e3 * iteration_s:.3g} ms an iteration, longest response {measured.lengths.longest} tokens"
    )
    yield f"  a step of this run took {measured.step_s:.3g} s, and takes {itself.step_s:.3g} s in the simulation"
    each = devices_per_engine(config)
    total = config.generator.num_engines * each + config.learner.num_ranks
    yield f"{total} devices, {each} for an engine and 1 for a rank; the same batches and max_staleness:"
    yield "  engines  ranks   step, s  tokens/s  learner waits  engines idle  staleness"
    splits = []
    for num_engines in options(total, each, config.generator.num_engines):
        splits.append(_try(config, measured, iteration_s, num_engines, total - num_engines * each))
        yield _line(splits[-1])
    best = max(splits, key=lambda s: s.found.trained_tokens_per_s)
    now = next(s for s in splits if s.num_engines == config.generator.num_engines)
    gain = best.found.trained_tokens_per_s / now.found.trained_tokens_per_s
    if gain < 1 + 2 * _CLOSE:
        yield f"advice: keep {now.num_engines} engines and {now.num_ranks} ranks"
    else:
        yield (
            f"advice: generator.num_engines={best.num_engines} learner.num_ranks={best.num_ranks}, {gain:.2f} times "
            f"the tokens a second of {now.num_engines} engines and {now.num_ranks} ranks"
        )


def devices_per_engine(config: Config) -> int:
    """Return the devices that an engine occupies."""
    generator = config.generator
    return generator.tensor_parallel_size * generator.pipeline_parallel_size * generator.data_parallel_size


def options(num_devices: int, devices_per_engine: int, num_engines: int) -> list[int]:
    """Return the numbers of engines to try: all that leave a rank, or some evenly spread ones and `num_engines`."""
    most = (num_devices - 1) // devices_per_engine
    if most <= _MOST_OPTIONS:
        return list(range(1, most + 1))
    spread = {round(1 + i * (most - 1) / (_MOST_OPTIONS - 1)) for i in range(_MOST_OPTIONS)}
    return sorted(spread | {num_engines})


def fit(measured: MeasuredRun) -> tuple[float, Simulated]:
    """Return the seconds of an iteration with which engines are as busy as in the run, and the run's simulation."""
    config, wanted = measured.config, measured.engine_s_per_token
    iteration_s = wanted * config.generator.max_num_seqs
    for _ in range(_TRIES):
        found = _try(config, measured, iteration_s, config.generator.num_engines, config.learner.num_ranks).found
        busy = found.time_share["generators"].get("busy", 0.0) * config.generator.num_engines
        ratio = busy / found.trained_tokens_per_s / wanted
        if abs(ratio - 1) < _CLOSE:
            break
        iteration_s /= ratio  # nearly proportional: as many engines are busy for longer
    return iteration_s, found


def _try(config: Config, measured: MeasuredRun, iteration_s: float, num_engines: int, num_ranks: int) -> Split:
    filling = 2 * (config.replay.max_staleness + 2)
    num_steps = filling + max(10, min(_NUM_STEPS, _MOST_GROUPS // config.replay.groups_per_step))
    parts = {
        "run": {"num_steps": num_steps},
        "generator": {"num_engines": num_engines},
        "learner": {"num_ranks": num_ranks},
        "checkpoint": {"every_steps": None},
    }
    changed = {name: getattr(config, name).model_copy(update=values) for name, values in parts.items()}
    workload = measured.workload(iteration_s, num_ranks)
    return Split(
        num_engines, num_ranks, simulate(config.model_copy(update=changed), workload, num_warmup_steps=filling)
    )


def _line(split: Split) -> str:
    found = split.found
    waits = found.time_share["learner"].get("wait", 0.0)
    idle = found.time_share["generators"].get(IDLE, 0.0)
    return (
        f"  {split.num_engines:7d}  {split.num_ranks:5d}  {found.step_s:8.3g}  {found.trained_tokens_per_s:8.4g}  "
        f"{waits:13.0%}  {idle:12.0%}  {found.staleness_mean:9.1f}"
    )
