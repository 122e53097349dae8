"""Metrics of held-out questions, pass@k, maj@n and others, with the engines and rewards that training uses."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np

from quatro_ray.telemetry.evaluation_result import EvaluationResult
from quatro_ray.types import GroupSummary, Query, SamplingParams


class Pools(Protocol):
    """Generates one group and scores it, and raises if either fails; evaluation/sampler.py implements it."""

    async def sample(
        self, group_id: int, query: Query, sampling: SamplingParams, size: int, *, read: bool
    ) -> tuple[GroupSummary, dict[str, object] | None]:
        """Return the scores of `size` responses and, if `read`, the group in the form of rollouts.jsonl."""
        ...


def pass_at_k(num_correct: Sequence[int], num_samples: int, k: int) -> float:
    """Return the unbiased estimate 1 − C(n−c, k)/C(n, k), computed as a stable product, averaged over queries.

    Source: Chen et al., arXiv 2107.03374, eq. 1. The plug-in 1 − (1 − c/n)^k is biased low.

    Args:
        num_correct: c of each query.
        num_samples: n, the same for all queries.
        k: at most n.

    Raises:
        ValueError: k exceeds the number of samples.
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} needs at least {k} samples a query, not {num_samples}")
    return float(np.mean(_pass_rates(num_correct, num_samples, k)))


def _pass_rates(num_correct: Sequence[int], num_samples: int, k: int) -> list[float]:
    return [1.0 - _share_without_success(c, num_samples, k) for c in num_correct]


def _share_without_success(correct: int, n: int, k: int) -> float:
    if n - correct < k:
        return 0.0
    return float(np.prod(1.0 - k / np.arange(n - correct + 1, n + 1)))


def majority_is_right(answers: Sequence[str | None], correct: Sequence[bool]) -> bool:
    """Return whether the most frequent answer is correct; of equally frequent ones the first. None is no answer."""
    counts = Counter(a for a in answers if a is not None)
    if not counts:
        return False
    winner, _ = counts.most_common(1)[0]
    return correct[list(answers).index(winner)]


def interval(rates: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Return a confidence interval for the mean over all questions that could be asked.

    The exact binomial interval of Clopper and Pearson, for the number of coin flips that would have the variance found
    over questions. It holds for few questions and for rates near 0 and 1, where the mean ± 2 standard errors does not:
    if all answers are wrong, that has no width at all.

    Source: Korn and Graubard, Survey Methodology 24 (1998) 193; the standard of the US health statistics for shares.

    Args:
        rates: a share of each question, in [0, 1], such as that of its correct responses.
        level: probability with which the interval holds.
    """
    # quantiles of normal, Student's t and beta distributions: scipy.stats would load for more than a second
    from scipy.special import betaincinv, ndtri, stdtrit

    num, mean, tail = len(rates), float(np.mean(rates)), (1 - level) / 2
    flips = float(num)
    if num > 1 and (variance := float(np.var(rates, ddof=1)) / num) > 0:
        # few questions know their variance badly, as the wider tails of Student's t say
        flips = mean * (1 - mean) / variance * float(ndtri(tail) / stdtrit(num - 1, tail)) ** 2
    successes = flips * mean
    low = float(betaincinv(successes, flips - successes + 1, tail)) if mean > 0 else 0.0
    high = float(betaincinv(successes + 1, flips - successes, 1 - tail)) if mean < 1 else 1.0
    return low, high


async def evaluate(
    pools: Pools,
    name: str,
    queries: Sequence[Query],
    sampling: SamplingParams,
    num_samples: int,
    *,
    pass_at: Sequence[int],
    version: int,
    step: int,
    num_read: int = 0,
) -> EvaluationResult:
    """Sample every query `num_samples` times and compute the metrics; actors/verifier.py decides which are correct.

    Args:
        pools: generates and scores.
        name: name of the held-out set.
        queries: its questions.
        sampling: its seed is the one of the first query; the others' follow from it.
        num_samples: responses to each question.
        pass_at: values of k.
        version: policy version of the engines.
        step: optimiser step of that policy.
        num_read: number of first questions whose responses are kept for people to read.
    """

    async def one(index: int, query: Query) -> tuple[GroupSummary, dict[str, object] | None]:
        seeded = replace(sampling, seed=None if sampling.seed is None else sampling.seed + index * num_samples)
        return await pools.sample(-1 - index, query, seeded, num_samples, read=index < num_read)

    samples = await asyncio.gather(*(one(i, q) for i, q in enumerate(queries)))
    results = [summary for summary, _ in samples]
    correct = [sum(r.correct) for r in results]
    rates = {k: _pass_rates(correct, num_samples, k) for k in pass_at}
    majority = [float(majority_is_right(r.answers, r.correct)) for r in results]
    return EvaluationResult(
        name=name,
        version=version,
        step=step,
        num_queries=len(queries),
        samples_per_query=num_samples,
        pass_at={k: pass_at_k(correct, num_samples, k) for k in pass_at},
        majority=float(np.mean(majority)),
        intervals={f"pass_at_{k}": interval(of_k) for k, of_k in rates.items()} | {"majority": interval(majority)},
        num_unique_correct=sum(
            len({a for a, right in zip(r.answers, r.correct, strict=True) if right}) for r in results
        ),
        mean_reward=float(np.mean([x for r in results for x in r.rewards])),
        truncated_share=sum(r.truncated for r in results) / (len(queries) * num_samples),
        num_tokens=sum(sum(r.response_tokens) for r in results),
        rollouts=tuple(read for _, read in samples[:num_read] if read is not None),
    )
