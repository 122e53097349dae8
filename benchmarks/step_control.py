"""Cost of step control: two learner groups on ZeRO-3, one with it and one without, alternate on the same batches.

    python -m benchmarks.step_control

Target: at most 10 % of the learner's step time while it acts in every step. Two minutes on two cores.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import ray

from quatro_ray.actors.learner import LearnerActor
from quatro_ray.config import LearnerConfig, QuatroConfig, StepControlConfig, TinyModelConfig
from quatro_ray.engines.learner_spec import LearnerSpec
from quatro_ray.engines.tiny_model import make_model, save_pretrained
from quatro_ray.engines.tiny_tokenizer import make_tokenizer
from quatro_ray.replay.buffer import LeasedBatch
from quatro_ray.replay.staleness import Lineage
from quatro_ray.types import Outcome, Query, Rollout, RolloutGroup, Score, VersionSpan

TARGET = 0.10
NUM_STEPS = 15
NUM_QUERIES, GROUP_SIZE, RESPONSE_TOKENS = 16, 8, 64
OFF = StepControlConfig(window_kl_nats_per_token=None)
MODEL = TinyModelConfig(kind="tiny", num_layers=4, hidden_size=128, num_heads=4)


def start(model_path: Path, control: StepControlConfig) -> list[Any]:
    config = LearnerConfig(
        num_ranks=2, learning_rate=1e-3, dtype="float32", tokens_per_micro_batch=1100, step_control=control
    )
    env = {"env_vars": {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}}
    spec = LearnerSpec(
        model_path=str(model_path),
        config=config,
        objective=QuatroConfig(kind="quatro"),
        device="cpu",
        temperature=1.0,
        max_response_tokens=RESPONSE_TOKENS,
        seed=0,
        num_steps=NUM_STEPS,
    )
    made = LearnerActor.options(num_cpus=0.25, runtime_env=env)  # type: ignore[attr-defined]
    actors = [made.remote(spec, rank=rank) for rank in range(2)]
    address, port = ray.get([actors[0].address.remote(), actors[0].free_port.remote()], timeout=120)
    ray.get([a.start.remote(address, port) for a in actors], timeout=240)
    return actors


def make_groups(version: int) -> tuple[RolloutGroup, ...]:
    """Return random rollouts that were sampled two steps before `version`."""
    rng = np.random.default_rng(version)

    def one() -> Rollout:
        tokens = rng.integers(2, 250, RESPONSE_TOKENS).astype(np.int32)
        logprobs = np.full(RESPONSE_TOKENS, -5.5, dtype=np.float32)
        spans = (VersionSpan(max(0, version - 2), 0, RESPONSE_TOKENS),)
        return Rollout(tokens, logprobs, spans, "", "stop", Score(float(rng.integers(0, 2)), Outcome.OK, ""))

    prompt = np.arange(5, 13, dtype=np.int32)
    return tuple(
        RolloutGroup(q, Query(str(q), "x", "y"), prompt, tuple(one() for _ in range(GROUP_SIZE)))
        for q in range(NUM_QUERIES)
    )


def timed_step(actors: list[Any], leased: Any, version: int) -> tuple[float, dict[str, Any]]:
    begun = time.perf_counter()
    metrics, *_ = ray.get([a.train_step.remote(leased, version) for a in actors], timeout=300)
    return time.perf_counter() - begun, metrics


def measure() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = make_tokenizer()
        save_pretrained(make_model(MODEL, tokenizer, seed=0), tokenizer, Path(folder))
        groups = {"off": start(Path(folder), OFF), "on": start(Path(folder), StepControlConfig())}
        seconds: dict[str, list[float]] = {"off": [], "on": []}
        acted, passes = [], []
        for version in range(NUM_STEPS):
            leased = ray.put(LeasedBatch(make_groups(version), Lineage.unbroken(version)))
            for name in ("on", "off") if version % 2 else ("off", "on"):
                duration, metrics = timed_step(groups[name], leased, version)
                seconds[name].append(duration)
                if name == "on":
                    acted.append(metrics["step_control/acted"])
                    passes.append(metrics["step_control/num_passes"])
    # without the first steps, which allocate memory
    ratios = sorted(a / b - 1 for a, b in zip(seconds["on"][3:], seconds["off"][3:], strict=True))
    return {
        "step_control_cost": statistics.median(ratios),
        "step_control_cost_quartiles": [ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]],
        "target": TARGET,
        "probe_share": StepControlConfig().probe_share,
        "frac_steps_acted": statistics.mean(acted),
        "passes_per_step": statistics.mean(passes),
        "step_s_off": statistics.median(seconds["off"][3:]),
        "step_s_on": statistics.median(seconds["on"][3:]),
    }


def main() -> None:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        figures = measure()
    finally:
        ray.shutdown()
    print(f"a step takes {figures['step_s_off']:.3f} s without and {figures['step_s_on']:.3f} s with control")
    print(json.dumps(figures))
    sys.exit(figures["step_control_cost"] > TARGET)


if __name__ == "__main__":
    main()
