"""Runs a configuration in virtual time: real controller, fleet, weight sync, buffer and checkpoints."""

from __future__ import annotations

import asyncio
import io
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any

from rich.console import Console

from quatro_ray.actors.device_turns import DeviceTurns
from quatro_ray.actors.fleet import Fleet
from quatro_ray.config import Config
from quatro_ray.config.data import FilterConfig
from quatro_ray.data.dataset import Dataset, QueryStream
from quatro_ray.engines.checkpoint_store import CheckpointStore
from quatro_ray.orchestrator.components import Components
from quatro_ray.orchestrator.controller import Controller
from quatro_ray.replay.buffer import ReplayBuffer
from quatro_ray.simulation.engine import SimulatedEngine
from quatro_ray.simulation.learner import SimulatedLearner, SimulatedVerifiers
from quatro_ray.simulation.virtual_loop import VirtualLoop
from quatro_ray.simulation.workload import Workload
from quatro_ray.telemetry.console import Progress
from quatro_ray.telemetry.recorder import Recorder
from quatro_ray.types import Query
from quatro_ray.weight_sync.coordinator import WeightSyncCoordinator

_NUM_QUERIES = 1000
_DEADLINE_S = 1e7
_LOOK_EVERY_S = 60.0


class DirectReplay:
    """The buffer behind the asynchronous interface of actors/interfaces.py:Replay."""

    def __init__(self, buffer: ReplayBuffer) -> None:
        self.buffer = buffer

    def __getattr__(self, name: str) -> Any:
        async def call(*args: Any) -> Any:
            return getattr(self.buffer, name)(*args)

        return call


@dataclass(frozen=True)
class Simulated:
    """Outcome of a simulated run, without its first steps, in which engines and buffer fill.

    Attributes:
        step_s: mean seconds between two steps.
        trained_tokens_per_s: response tokens.
        staleness_mean: mean age of the trained tokens, in optimiser steps.
        time_share: mean over the steps of the share of each state, by role.
        num_lost: engines lost in the whole run.
        drops: dropped groups by reason, in the whole run.
        cpu_s_per_group: CPU seconds of this process for each trained group, median over the steps.
    """

    step_s: float
    trained_tokens_per_s: float
    staleness_mean: float
    time_share: dict[str, dict[str, float]]
    num_lost: int
    drops: dict[str, int]
    cpu_s_per_group: float


def simulate(
    config: Config,
    workload: Workload,
    *,
    num_warmup_steps: int,
    keep: Path | None = None,
    make_engine: Callable[[Workload], SimulatedEngine] = SimulatedEngine,
) -> Simulated:
    """Run the configuration on simulated engines and learner, and return figures.

    Args:
        config: engines, groups, staleness and `run.num_steps`. It writes to a temporary folder and evaluates nothing.
        workload: speeds, lengths and failures.
        num_warmup_steps: steps that the figures leave out.
        keep: where the records of the run are copied to, if they are wanted.
        make_engine: makes each engine.
    """
    with tempfile.TemporaryDirectory(prefix="quatro_ray_") as folder:
        inside = _patient(config, Path(folder))
        loop = VirtualLoop()
        cpu: list[float] = []
        recorder = _Timed(cpu, inside, clock=loop.time)
        try:
            controller, buffer = loop.run_until_complete(_run(loop, inside, workload, recorder, make_engine))
        finally:
            recorder.close()
            loop.close()
        lines = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        if keep is not None:
            shutil.copytree(folder, keep)
    kept = [json.loads(line) for line in lines][num_warmup_steps:]
    return Simulated(
        step_s=(kept[-1]["time_s"] - kept[0]["time_s"]) / (len(kept) - 1),
        trained_tokens_per_s=sum(m["tokens/trained"] for m in kept[1:]) / (kept[-1]["time_s"] - kept[0]["time_s"]),
        staleness_mean=mean(m["off_policy/staleness_mean"] for m in kept),
        time_share=_shares(kept),
        num_lost=controller.num_lost,
        drops={reason: num for reason, num in buffer.stats().drops.items() if num and reason != "run_ended"},
        cpu_s_per_group=median(b - a for a, b in pairwise(cpu[num_warmup_steps:])) / config.replay.groups_per_step,
    )


def _patient(config: Config, folder: Path) -> Config:
    """Return the configuration with another folder, without deadlines for real seconds, and without filters.

    All simulated rewards are equal, and filters of groups without a preference would let nothing pass.
    """
    parts = {
        "run": {"dir": folder},
        "generator": dict.fromkeys(("start_deadline_s", "group_deadline_s", "progress_deadline_s"), _DEADLINE_S),
        "cluster": {"stall_deadline_s": _DEADLINE_S},
    }
    changed = {name: getattr(config, name).model_copy(update=values) for name, values in parts.items()}
    return config.model_copy(update=changed | {"filters": FilterConfig()})


class _Timed(Recorder):
    """Also notes the CPU seconds of this process at each step."""

    def __init__(self, cpu: list[float], config: Config, clock: Any) -> None:
        progress = Progress(Console(file=io.StringIO()))
        super().__init__(config.run.dir, num_steps=config.run.num_steps, progress=progress, clock=clock)
        self._cpu = cpu

    def step(self, *args: Any) -> None:
        super().step(*args)
        self._cpu.append(time.process_time())


async def _run(
    loop: VirtualLoop,
    config: Config,
    workload: Workload,
    recorder: Recorder,
    make_engine: Callable[[Workload], SimulatedEngine],
) -> tuple[Fleet, ReplayBuffer]:
    first = [make_engine(workload) for _ in range(config.generator.num_engines)]
    spare = iter(first)
    device_lock = asyncio.Lock()
    fleet = Fleet(
        lambda _: next(spare, None) or make_engine(workload),
        config.generator,
        _DEADLINE_S,
        clock=loop.time,
        look_every_s=_LOOK_EVERY_S,
        device_lock=device_lock if config.alternates else None,
    )
    buffer = ReplayBuffer(config.replay, ":memory:", num_steps=config.run.num_steps, clock=loop.time)
    learner = SimulatedLearner(workload)
    components = Components(
        generators=fleet,
        verifiers=SimulatedVerifiers(workload),
        replay=DirectReplay(buffer),
        learner=learner,
        weight_sync=WeightSyncCoordinator(
            fleet, learner, config.weight_sync, _DEADLINE_S, generates_during_transfer=False
        ),
        checkpoints=CheckpointStore(config.run.dir / "checkpoints", config.checkpoint.keep),
        learner_turn=DeviceTurns(fleet, device_lock, _DEADLINE_S).of_learner if config.alternates else nullcontext,
    )
    queries = [Query(str(i), "simulated", "", source="simulated") for i in range(_NUM_QUERIES)]
    dataset = Dataset({"simulated": queries}, {"simulated": 1.0}, {}, {})
    for engine in first:
        engine.live()
    controller = Controller(config, components, QueryStream(dataset, config.run.seed), {}, recorder)
    await controller.run()
    return fleet, buffer


def _shares(metrics: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    names = {key for m in metrics for key in m if key.startswith("time_share/")}
    for name in sorted(names):
        _, role, state = name.split("/")
        found.setdefault(role, {})[state] = mean(m.get(name, 0.0) for m in metrics)
    return found
