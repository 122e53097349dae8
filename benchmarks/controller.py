"""CPU of the controller for each group, over the number of engines: `python -m benchmarks.controller`.

The real controller, fleet, weight sync and buffer (ledger in memory) in virtual time: eight groups of 16 responses an
engine and step, so that a larger system does more of the same. Engines, learner and verifiers only wait. It has no Ray,
whose calls come on top. The last line is JSON; the exit status is 1 if a group costs more than FLAT times as much in
the largest system as in the smallest.
"""

from __future__ import annotations

import asyncio
import json
import sys
from functools import lru_cache
from pathlib import Path
from random import Random

import numpy as np

from quatro_ray.actors.memory import collect_rarely
from quatro_ray.config import Config, load_config
from quatro_ray.simulation.decoding import EngineSpeed
from quatro_ray.simulation.engine import SimulatedEngine
from quatro_ray.simulation.ring import simulate
from quatro_ray.simulation.workload import Lengths, Workload
from quatro_ray.types import GenerationSummary, Query, Rollout, RolloutGroup, SamplingParams, VersionSpan

ENGINES = (8, 64, 256, 1_024)
FLAT = 1.2
_GROUPS_PER_ENGINE = 8
_NUM_STEPS, _NUM_WARMUP_STEPS = 9, 3
_NUM_TOKENS, _LOG_SECONDS = 8, 3.0
_PROMPT = np.ones(1, dtype=np.int32)
_RNG = Random(0)
_WORKLOAD = Workload(
    Lengths(median=1_000, sigma=1.0, longest=16_384),
    EngineSpeed(iteration_s=0.01, sequence_s=2e-5, context_s=4e-9, max_num_seqs=256),
    step_s=10.0,
    token_s=0.0,
)


class WaitingEngine(SimulatedEngine):
    """An engine that costs no time itself: it returns the same rollouts for each group, after a random time."""

    async def generate(
        self, group_id: int, query: Query, sampling: SamplingParams, group_size: int, begun: tuple[Rollout, ...] = ()
    ) -> tuple[GenerationSummary, RolloutGroup]:
        await asyncio.sleep(_RNG.lognormvariate(_LOG_SECONDS, 0.5))
        group = RolloutGroup(group_id, query, _PROMPT, rollouts_of(await self.policy_version(), group_size))
        return GenerationSummary(group.num_tokens, 0), group


@lru_cache
def rollouts_of(version: int, group_size: int) -> tuple[Rollout, ...]:
    ids, logprobs = np.ones(_NUM_TOKENS, dtype=np.int32), np.zeros(_NUM_TOKENS, dtype=np.float32)
    rollout = Rollout(ids, logprobs, (VersionSpan(version, 0, _NUM_TOKENS),), text="", finish_reason="stop")
    return (rollout,) * group_size


def config(num_engines: int) -> Config:
    settings = {
        "generator.num_engines": num_engines,
        "generator.max_groups_in_flight": 32,
        "replay.groups_per_step": _GROUPS_PER_ENGINE * num_engines,
        "replay.group_size": 16,
        "replay.max_staleness": 2,
        "replay.on_stale": "train",
        "run.num_steps": _NUM_STEPS,
        "learner.num_warmup_steps": 0,
        "evaluation.num_engines": 0,
    }
    return load_config(Path("configs/demo.yaml"), [f"{name}={value}" for name, value in settings.items()])


def main() -> int:
    collect_rarely()  # as a run does
    found = {}
    for num_engines in ENGINES:
        figures = simulate(
            config(num_engines), _WORKLOAD, num_warmup_steps=_NUM_WARMUP_STEPS, make_engine=WaitingEngine
        )
        found[num_engines] = {
            "cpu_ms_per_group": round(1e3 * figures.cpu_s_per_group, 3),
            "step_s": round(figures.step_s, 1),
            "learner_waits": round(figures.time_share["learner"].get("wait", 0.0), 3),
        }
        print(f"{num_engines} engines: {found[num_engines]}", flush=True)
    growth = found[ENGINES[-1]]["cpu_ms_per_group"] / found[ENGINES[0]]["cpu_ms_per_group"]
    print(json.dumps({"by_engines": found, "growth": round(growth, 2), "missed": growth > FLAT}))
    return int(growth > FLAT)


if __name__ == "__main__":
    sys.exit(main())
