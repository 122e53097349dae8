"""CPU time of a learner step, as it was and as it is: `python -m benchmarks.learner_step`.

One learner rank trains on random rollouts, and three kinds of steps take turns, so that all see the same noise: with a
mask over the packed row; without one; and with a further pass that scores all rollouts before the step, as M2PO needs
it. The first case has the demo's model and lengths. The last line is JSON; the exit status is 1 if a step without a
mask is less than twice as fast in any case.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from statistics import median

import numpy as np
import torch

from benchmarks.gpu.learner import Case, make_engine, random_batch, save_random_model

_TARGET = 2.0
_ROUNDS = 7
CASES = {
    "demo: 256 rollouts of 4 to 8 tokens": Case(
        "tiny", "cpu", 8, 0.5, 2_048, groups=16, group_size=16, learning_rate=4e-4, dtype="float32"
    ),
    "32 rollouts of 64 to 256 tokens": Case(
        "tiny", "cpu", 256, 0.25, 2_048, groups=4, group_size=8, learning_rate=4e-4, dtype="float32"
    ),
    "32 rollouts of 16 to 512 tokens": Case(
        "tiny", "cpu", 512, 1 / 32, 2_048, groups=4, group_size=8, learning_rate=4e-4, dtype="float32"
    ),
}


def compare(name: str) -> dict[str, float]:
    """Return the median CPU milliseconds of each kind of step, and the median ratios of neighbouring steps."""
    torch.set_num_threads(1)
    case, rng = CASES[name], np.random.default_rng(0)
    seconds: dict[str, list[float]] = {"masked": [], "unmasked": [], "one pass more": []}
    with tempfile.TemporaryDirectory() as path:
        save_random_model(case, path)
        engine = make_engine(case, path)
        trainer = engine._loaded.trainer
        plain = trainer._objective
        for _ in range(_ROUNDS + 1):
            for kind, measured in seconds.items():
                engine._loaded.policy.causal_lm.set_attn_implementation("sdpa" if kind == "masked" else "varlen")
                trainer._objective = replace(plain, needs_log_ratio=kind == "one pass more")
                batch = random_batch(case, engine.version, rng)
                begun = time.process_time()
                engine.train_step(batch, engine.version)
                measured.append(time.process_time() - begun)
        engine.shutdown()
    masked, unmasked, more = (np.array(measured[1:]) for measured in seconds.values())  # the first of each warms up
    return {
        "masked_ms": round(1e3 * median(masked), 1),
        "unmasked_ms": round(1e3 * median(unmasked), 1),
        "one_pass_more_ms": round(1e3 * median(more), 1),
        "speed_up": round(float(np.median(masked / unmasked)), 2),
        "share_of_one_pass": round(float(np.median(1 - unmasked / more)), 3),
    }


def main() -> int:
    if sys.argv[1:]:
        print(json.dumps(compare(sys.argv[1])))
        return 0
    figures = {}
    for name in CASES:  # a process each, because a process can join one group of ranks only
        command = [sys.executable, "-m", "benchmarks.learner_step", name]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        if done.returncode:
            sys.exit(f"{name}: {done.stderr[-2000:]}")
        figures[name] = json.loads(done.stdout.splitlines()[-1])
        print(name, figures[name], flush=True)
    worst = min(figure["speed_up"] for figure in figures.values())
    print(json.dumps({"cases": figures, "target": _TARGET, "worst_speed_up": worst}))
    return int(worst < _TARGET)


if __name__ == "__main__":
    sys.exit(main())
