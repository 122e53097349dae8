"""CPU of the controller for each group, over the number of engines: `python -m benchmarks.controller`.

The real controller, fleet, weight sync and buffer (ledger in memory) with simulated engines in virtual time: eight
groups of 16 responses an engine and step, so that a larger system does more of the same. Engines, learner and verifiers
only wait, and what their simulation costs is in the figure. It has no Ray, whose calls come on top. The last line is
JSON; the exit status is 1 if a group costs more than FLAT times as much in the largest system as in the smallest.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from quatro_ray.actors.memory import collect_rarely
from quatro_ray.config import Config, load_config
from quatro_ray.simulation.decoding import EngineSpeed
from quatro_ray.simulation.ring import simulate
from quatro_ray.simulation.workload import Lengths, Workload

ENGINES = (8, 64, 256, 1_024)
FLAT = 1.2
_GROUPS_PER_ENGINE = 8
_NUM_STEPS, _NUM_WARMUP_STEPS = 9, 3
_WORKLOAD = Workload(
    Lengths(median=1_000, sigma=1.0, longest=16_384),
    EngineSpeed(iteration_s=0.01, sequence_s=2e-5, context_s=4e-9, max_num_seqs=256),
    step_s=30.0,
    token_s=0.0,
    tokens_per_item=1_024,
)


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
        figures = simulate(config(num_engines), _WORKLOAD, num_warmup_steps=_NUM_WARMUP_STEPS)
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
