"""Speed of the trust-region solver, as ratios measured in one run: `python -m benchmarks.solver`.

A million samples (62,500 groups of 16) on one thread, against `torch.logsumexp` over the same float64 tensor and
against a loop of scipy's brentq over the groups, which is timed on a random subset and extrapolated. The measurements
are interleaved, round by round. The last line is JSON; the exit status is 1 if a target is missed.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from scipy.optimize import brentq
from torch import Tensor

from quatro_ray.algorithms.trust_region import solve

_QUERIES, _GROUP = 62_500, 16
_ROUNDS = 15
_BRENTQ_GROUPS = 40
"""Groups in a round; each round draws a new random subset."""
_ALONE = "logsumexp, alone before"
"""Timed alone it is faster, because other work does not evict its caches. The target refers to the interleaved time."""
_BUDGET, _CAP = 0.1, 1e6
_AT_MOST_LOGSUMEXP = 10.0
_AT_LEAST_BRENTQ = 500.0
_AT_MOST_GPU_MS = 2.0


def _milliseconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) * 1e3


def _cases() -> dict[str, Callable[[], object]]:
    """Return what is timed in each round; only `solve` has targets."""
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(_QUERIES, _GROUP, dtype=torch.float64, generator=generator)
    everything = torch.ones_like(rewards, dtype=torch.bool)
    ragged = torch.arange(_GROUP) < torch.randint(2, _GROUP + 1, (_QUERIES, 1), generator=generator)
    mixed = 10 ** (-8 * torch.rand(_QUERIES, dtype=torch.float64, generator=generator))
    successes = (rewards > 0.5).to(torch.float64)
    picks = np.random.default_rng(0)
    return {
        "logsumexp": lambda: torch.logsumexp(rewards, 1),
        "solve": lambda: solve(rewards, everything, _BUDGET, _CAP),
        "solve, 1e-8 nat": lambda: solve(rewards, everything, 1e-8, _CAP),
        "solve, 1 nat": lambda: solve(rewards, everything, 1.0, _CAP),
        "solve, 1e-8 to 1 nat mixed": lambda: solve(rewards, everything, mixed, _CAP),
        "solve, binary rewards, cap 2": lambda: solve(successes, everything, _BUDGET, 2.0),
        "solve, ragged groups": lambda: solve(rewards, ragged, _BUDGET, _CAP),
        "brentq": lambda: _brentq_loop(rewards, picks),
    }


def _brentq_loop(rewards: Tensor, picks: np.random.Generator) -> None:
    """Solve the same problem group by group: the cap if it binds, else the root; then the targets and the KL."""
    for query in picks.choice(_QUERIES, _BRENTQ_GROUPS, replace=False):
        r = rewards[query].numpy()
        eta = _CAP if _excess(_CAP, r) <= 0 else brentq(_excess, 0.0, _CAP, args=(r,), rtol=1e-9)
        z = eta * (r - r.max())
        t = z - np.log(np.exp(z).mean())
        _ = float(np.exp(t) @ t / len(t))


def _excess(eta: float, rewards: np.ndarray) -> float:
    z = eta * (rewards - rewards.max())
    w = np.exp(z)
    total = w.sum()
    return float(w @ z / total - np.log(total / len(z)) - _BUDGET)


def _gpu_ms() -> float | None:
    """Return the median time of `solve` on the GPU with the tensor in its memory; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    rewards = torch.randn(_QUERIES, _GROUP, dtype=torch.float64, device="cuda")
    everything = torch.ones_like(rewards, dtype=torch.bool)

    def once() -> None:
        solve(rewards, everything, _BUDGET, _CAP)
        torch.cuda.synchronize()

    times = [_milliseconds(once) for _ in range(60)]
    return statistics.median(times[10:])


def _measure() -> dict[str, list[float]]:
    """Return milliseconds of every round after a warm-up round; brentq is scaled to all groups."""
    cases = _cases()
    alone = [_milliseconds(cases["logsumexp"]) for _ in range(1 + _ROUNDS)][1:]
    times: dict[str, list[float]] = {name: [] for name in cases}
    for counted in [False] + [True] * _ROUNDS:
        for name, work in cases.items():
            taken = _milliseconds(work)
            if counted:
                times[name].append(taken * (_QUERIES / _BRENTQ_GROUPS if name == "brentq" else 1))
    return times | {_ALONE: alone}


def main() -> int:
    torch.set_num_threads(1)
    times, gpu_ms = _measure(), _gpu_ms()
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(f"{_QUERIES} groups of {_GROUP}, one thread, {_ROUNDS} interleaved rounds; budget {_BUDGET} nat unless named")
    print(f"{'':30} {'median ms':>10} {'min':>10} {'max':>10} {'/ logsumexp':>12}")
    for name, values in times.items():
        ratio = medians[name] / medians["logsumexp"]
        print(f"{name:30} {medians[name]:10.1f} {min(values):10.1f} {max(values):10.1f} {ratio:12.1f}")
    print(f"brentq: extrapolated from {_BRENTQ_GROUPS} random groups a round")
    over_logsumexp = medians["solve"] / medians["logsumexp"]
    brentq_over = medians["brentq"] / medians["solve"]
    missed = [
        text
        for met, text in (
            (over_logsumexp <= _AT_MOST_LOGSUMEXP, f"solve takes {over_logsumexp:.1f} times logsumexp, not 10"),
            (brentq_over >= _AT_LEAST_BRENTQ, f"brentq takes {brentq_over:.0f} times solve, not 500"),
            (gpu_ms is None or gpu_ms <= _AT_MOST_GPU_MS, f"solve takes {gpu_ms} ms on the GPU, not 2"),
        )
        if not met
    ]
    for text in missed:
        print(f"MISSED: {text}")
    figures = {
        "solve_over_logsumexp": round(over_logsumexp, 2),
        "brentq_loop_over_solve": round(brentq_over),
        "solve_over_logsumexp_alone": round(medians["solve"] / medians[_ALONE], 2),
        "over_logsumexp": {name: round(ms / medians["logsumexp"], 2) for name, ms in medians.items()},
        "median_ms": {name: round(ms, 2) for name, ms in medians.items()},
        "min_ms": {name: round(min(values), 2) for name, values in times.items()},
        "max_ms": {name: round(max(values), 2) for name, values in times.items()},
        "gpu_ms": None if gpu_ms is None else round(gpu_ms, 3),
        "rounds": _ROUNDS,
        "missed": missed,
    }
    print(json.dumps(figures))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
