"""The cost of isolation: killable worker processes against the bare library.

    python -m benchmarks.verifiers

A thousand answers as models write them (text with a boxed integer, fraction, decimal, expression or nothing) are
scored in turns, on the same machine: by math-verify alone (parse, parse, verify; its limits off) in 2 bare processes,
and by the reward `math` in 4 worker processes. Target: at least 90 % of the bare rate. Beside it, without a target, the
same reward in 2 bare processes: it compares integers without the library, and keeps gold answers that it has parsed.
Ends with one JSON line.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

from quatro_ray.config import MathRewardConfig, VerifierConfig
from quatro_ray.rewards.math import MathReward
from quatro_ray.rewards.workers import RewardProcesses
from quatro_ray.types import Query, Response

TARGET = 0.9
_NUM_ANSWERS, _ROUNDS, _BARE, _WORKERS = 1000, 3, 2, 4
_CONFIG = MathRewardConfig(kind="math")
_WORDS = tuple("so we add the two numbers and then divide both sides by what is left over which gives".split(" "))  # noqa: SIM905


def answers(seed: int = 0) -> list[tuple[Query, Response]]:
    """Return answers: two thirds integers, the rest fractions, decimals, expressions; a fifth wrong, some unboxed."""
    rng = random.Random(seed)
    made = []
    for index in range(_NUM_ANSWERS):
        gold, right = _problem(rng)
        given = right if rng.random() < 0.8 else str(rng.randint(-99, 99))
        text = " ".join(rng.choices(_WORDS, k=rng.randint(20, 400)))
        ending = rf" Therefore the answer is \boxed{{{given}}}." if rng.random() < 0.95 else " I do not know."
        response = Response(text + ending, len(text) // 4, truncated=False)
        made.append((Query(f"q{index}", "p", gold), response))
    return made


def _problem(rng: random.Random) -> tuple[str, str]:
    """Return a gold answer, and the same answer as a model may write it."""
    a, b, c = rng.randint(2, 99), rng.randint(2, 99), rng.randint(2, 9)
    forms = [
        (f"{a * b}", f"{a * b}"),
        (f"{a - b}", f"{a - b}"),
        (f"{a}{b}{c}", rf"{a}{b}{c}"),
        (rf"\frac{{{a}}}{{{b}}}", rf"\dfrac{{{a}}}{{{b}}}"),
        (f"{a / 8}", rf"\frac{{{a}}}{{8}}"),
        (rf"{c}\sqrt{{{b}}}", rf"\sqrt{{{b}}} \cdot {c}"),
        (f"x^{c} + {a}", f"{a} + x^{c}"),
    ]
    return forms[rng.choices(range(len(forms)), [4, 4, 4, 2, 2, 1, 1])[0]]


def _by_library(part: list[tuple[Query, Response]]) -> list[bool]:
    import logging

    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)
    return [
        verify(
            parse(rf"\boxed{{{query.answer}}}", parsing_timeout=None),
            parse(response.text, parsing_timeout=None),
            timeout_seconds=None,
        )
        for query, response in part
    ]


def _by_reward(part: list[tuple[Query, Response]]) -> list[float]:
    reward = MathReward(_CONFIG)
    return [reward(query, response) for query, response in part]


def _bare(items: list[tuple[Query, Response]], pool: ProcessPoolExecutor, score: Any) -> tuple[list[float], float]:
    begun = time.perf_counter()
    chunks = [items[i : i + 25] for i in range(0, len(items), 25)]
    scores = [float(s) for part in pool.map(score, chunks) for s in part]
    return scores, time.perf_counter() - begun


async def _isolated(items: list[tuple[Query, Response]], pool: RewardProcesses) -> tuple[list[float], float]:
    begun = time.perf_counter()
    scores = await asyncio.gather(*(pool.score(query, response, ["answer"]) for query, response in items))
    return [s.values["answer"] if s.values else -1.0 for s in scores], time.perf_counter() - begun


async def measure() -> dict[str, float]:
    items = answers()
    pool = RewardProcesses(VerifierConfig(num_workers=_WORKERS, deadline_s=30), {"answer": _CONFIG})
    await pool.start()
    with ProcessPoolExecutor(_BARE, mp_context=get_context("spawn")) as bare:
        _bare(items, bare, _by_library), await _isolated(items, pool)  # imports
        rounds = [
            (_bare(items, bare, _by_library), _bare(items, bare, _by_reward), await _isolated(items, pool))
            for _ in range(_ROUNDS)
        ]
    await pool.close()
    assert all(same[0] == isolated[0] for _, same, isolated in rounds), "isolation changed a score"
    library, same, isolated = ([r[i][1] for r in rounds] for i in range(3))
    return {
        "share_right": sum(rounds[0][2][0]) / len(items),
        "share_right_by_library": sum(rounds[0][0][0]) / len(items),
        "library_per_s": len(items) / statistics.median(library),
        "same_reward_bare_per_s": len(items) / statistics.median(same),
        "isolated_per_s": len(items) / statistics.median(isolated),
        "ratio": statistics.median(a / b for a, b in zip(library, isolated, strict=True)),
    }


def main() -> int:
    figures = asyncio.run(measure())
    print(f"isolated {figures['ratio']:.0%} of the library's bare rate (target {TARGET:.0%})")
    print(json.dumps({k: round(v, 4) for k, v in figures.items()} | {"target": TARGET}))
    return 0 if figures["ratio"] >= TARGET else 1


if __name__ == "__main__":
    sys.exit(main())
