"""pass@k on held-out questions, by the same engines and verifiers that training uses."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from quatro_ray.types import Query, SamplingParams


class Pools(Protocol):
    """Generates one group and scores it; raises where either fails."""

    async def sample(self, group_id: int, query: Query, sampling: SamplingParams, size: int) -> dict[str, Any]: ...


@dataclass(frozen=True)
class EvaluationResult:
    version: int
    num_queries: int
    samples_per_query: int
    pass_at: dict[int, float]
    num_tokens: int


def pass_at_k(num_correct: Sequence[int], num_samples: int, k: int) -> float:
    """Unbiased estimate 1 − C(n−c, k)/C(n, k), as a stable product, averaged over queries.

    Source: Chen et al., arXiv 2107.03374, eq. 1. The plug-in 1 − (1 − c/n)^k is biased low.

    Raises:
        ValueError: k exceeds the number of samples.
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} needs at least {k} samples a query, not {num_samples}")
    return float(np.mean([1.0 - _share_without_success(c, num_samples, k) for c in num_correct]))


def _share_without_success(correct: int, n: int, k: int) -> float:
    if n - correct < k:
        return 0.0
    return float(np.prod(1.0 - k / np.arange(n - correct + 1, n + 1)))


async def evaluate(
    pools: Pools, queries: Sequence[Query], sampling: SamplingParams, num_samples: int, *, version: int
) -> EvaluationResult:
    """Samples every query `num_samples` times; a reward of 1 or more counts as right."""

    async def one(index: int, query: Query) -> dict[str, Any]:
        seeded = replace(sampling, seed=None if sampling.seed is None else sampling.seed + index * num_samples)
        return await pools.sample(-1 - index, query, seeded, num_samples)

    results = await asyncio.gather(*(one(i, q) for i, q in enumerate(queries)))
    correct = [sum(r >= 1.0 for r in result["rewards"]) for result in results]
    return EvaluationResult(
        version=version,
        num_queries=len(queries),
        samples_per_query=num_samples,
        pass_at={k: pass_at_k(correct, num_samples, k) for k in (1, 8) if k <= num_samples},
        num_tokens=sum(sum(result["response_tokens"]) for result in results),
    )
