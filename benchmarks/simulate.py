"""A published speed-up of asynchronous training, simulated from its settings: `python -m benchmarks.simulate`.

verl's fully asynchronous mode with Qwen2.5-Math-7B on 128 H20 GPUs, answers of up to 28k tokens, batches of 512
questions with 16 answers: a synchronous step takes 356.3 s (generation 177.9 s), an asynchronous one 150.6 s, which is
2.35 times as many a day (https://verl.readthedocs.io/en/latest/advance/fully_async.html, tables of October 2025).

Three simulations, which share engines and lengths of answers:

- the synchronous generation on 128 GPUs, to which the median length, not published, was fitted;
- verl's asynchronous schedule with three thresholds, from the published times of training;
- this project's controller, fleet and buffer with the same engines, batches and times of training. Its engines may
  have 64 groups, where verl's have 16: as many as they decode at the same time.

The speed of an engine follows from the hardware: 4 H20 read 15.2 GB of weights and 57 KB of key-value cache for a token
at 4 TB/s each, and multiply at 60 % of 148 TFLOPS each; 3.5 ms an iteration are launches and communication. The last
line is JSON; the exit status is 1 if a simulation of verl differs by more than 15 % from what was published.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.schedules import Window, generation_s, window_s
from quatro_ray.config import Config, load_config
from quatro_ray.simulation.decoding import EngineSpeed
from quatro_ray.simulation.ring import simulate
from quatro_ray.simulation.workload import Lengths, Workload

TOLERANCE = 0.15
SYNCHRONOUS_STEP_S, SYNCHRONOUS_GENERATION_S = 356.30, 177.85
PUBLISHED = {0.5: (150.63, 113.16), 0.3: (146.11, 103.22), 0.1: (171.30, 109.12)}
"""Seconds of a step and of its training, by the threshold of staleness."""
_SYNC_S = 4.3
"""What is left of 150.63 s after 113.16 s of training and 33.14 s of waiting."""
_GROUPS, _PARTS, _SIZE = 128, 4, 16
"""A step trains four parts of 128 groups, each with 16 answers."""
_ENGINES = 16
_WORKLOAD = Workload(
    lengths=Lengths(median=1600, sigma=1.0, longest=28_672),
    engine=EngineSpeed(iteration_s=4.5e-3, sequence_s=43e-6, context_s=3.6e-9, max_num_seqs=256),
    step_s=0.0,
    token_s=0.0,
    verify_s=1.0,
    tokens_per_item=256,
)


def config(threshold: float) -> Config:
    """Return a configuration with verl's batches; it sends weights after each part, as this project does."""
    ahead = int((1 + threshold) * _PARTS) - 1
    settings = {
        "generator.num_engines": _ENGINES,
        "generator.max_groups_in_flight": 64,
        "replay.groups_per_step": _GROUPS,
        "replay.group_size": _SIZE,
        "replay.max_staleness": ahead,
        "replay.on_stale": "train",
        "run.num_steps": 60,
        "evaluation.num_engines": 0,
    }
    return load_config(Path("configs/demo.yaml"), [f"{name}={value}" for name, value in settings.items()])


def step_s(threshold: float) -> dict[str, Any]:
    """Return the seconds of a step as published, by verl's schedule and by this project's controller."""
    published, train_s = PUBLISHED[threshold]
    window = Window(_ENGINES, _GROUPS, _PARTS, threshold, train_s / _PARTS, _SYNC_S, group_size=_SIZE)
    theirs, waited = window_s(_WORKLOAD, window)
    ours = simulate(
        config(threshold), replace(_WORKLOAD, step_s=train_s / _PARTS, transfer_s=_SYNC_S / _PARTS), num_warmup_steps=20
    )
    return {
        "published": published,
        "simulated": round(theirs, 1),
        "waited": round(waited, 1),
        "speed_up": round(SYNCHRONOUS_STEP_S / theirs, 2),
        "this_project": round(_PARTS * ours.step_s, 1),
        "this_project_speed_up": round(SYNCHRONOUS_STEP_S / (_PARTS * ours.step_s), 2),
        "this_project_learner_waits": round(ours.time_share["learner"].get("wait", 0.0), 3),
        "this_project_staleness": round(ours.staleness_mean, 1),
    }


def main() -> int:
    generation = generation_s(_WORKLOAD, num_engines=2 * _ENGINES, num_groups=_GROUPS * _PARTS, group_size=_SIZE)
    print(f"synchronous generation: {generation:.1f} s, published {SYNCHRONOUS_GENERATION_S} s", flush=True)
    found = {}
    for threshold in PUBLISHED:
        found[threshold] = step_s(threshold)
        print(f"threshold {threshold}: {found[threshold]}", flush=True)
    missed = [
        f"threshold {threshold}: {figures['simulated']} s, published {figures['published']} s"
        for threshold, figures in found.items()
        if abs(figures["simulated"] / figures["published"] - 1) > TOLERANCE
    ]
    print(json.dumps({"synchronous_generation_s": round(generation, 1), "by_threshold": found, "missed": missed}))
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
