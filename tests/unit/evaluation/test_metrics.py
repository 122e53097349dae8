"""pass@k is the unbiased estimator."""

import asyncio
import math
from typing import Any

import pytest

from quatro_ray.evaluation.metrics import evaluate, majority_is_right, pass_at_k
from quatro_ray.types import GroupSummary, Query, SamplingParams


def exact(c: int, n: int, k: int) -> float:
    return 1 - math.comb(n - c, k) / math.comb(n, k)


@pytest.mark.parametrize("n", [8, 32])
@pytest.mark.parametrize("k", [1, 2, 8])
def test_equals_the_combinatorial_formula(n: int, k: int) -> None:
    for c in range(n + 1):
        assert pass_at_k([c], n, k) == pytest.approx(exact(c, n, k), abs=1e-12)


def test_averages_over_queries_and_is_unbiased() -> None:
    """n = 32 samples of p = 0.1: the mean over the binomial is 1 − 0.9^8 = 0.570, the plug-in gives 0.527."""
    assert pass_at_k([0, 8], 8, 1) == 0.5
    weights = [math.comb(32, c) * 0.1**c * 0.9 ** (32 - c) for c in range(33)]
    mean = sum(w * pass_at_k([c], 32, 8) for c, w in enumerate(weights))
    assert mean == pytest.approx(1 - 0.9**8, abs=1e-9)


@pytest.mark.parametrize("k", [0, 9])
def test_more_than_was_sampled_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match="needs at least"):
        pass_at_k([1], 8, k)


def test_majority() -> None:
    assert majority_is_right(["1", "2", "2"], [True, False, False]) is False
    assert majority_is_right(["1", "2"], [True, False]) is True  # a tie: the first
    assert majority_is_right([None, None, "2"], [False, False, True]) is True
    assert majority_is_right([None], [True]) is False


def test_evaluate_counts_what_is_right_and_gives_each_query_its_seed() -> None:
    seeds = []

    class Pools:
        async def sample(
            self, group_id: int, query: Query, sampling: SamplingParams, size: int, *, read: bool
        ) -> tuple[GroupSummary, dict[str, Any] | None]:
            seeds.append(sampling.seed)
            half = size // 2
            summary = GroupSummary(
                rewards=(1.5, 0.5) * half,
                reward_values=({},) * size,
                outcomes={"ok": size},
                answers=("a", "b", "c", "b", "a", "b", None, "b"),
                correct=(True, False) * half,
                truncated=2,
                turns=(1,) * size,
                response_tokens=(2,) * size,
            )
            return summary, {"id": query.query_id} if read else None

    queries = [Query(str(i), "p", "a") for i in range(3)]
    sampling = SamplingParams(1, 1, 4, seed=5)
    result = asyncio.run(evaluate(Pools(), "set", queries, sampling, 8, pass_at=(1, 8), version=7, step=7, num_read=2))
    assert result.pass_at == pytest.approx({1: 0.5, 8: 1.0})
    assert (result.num_tokens, result.version) == (48, 7)
    assert (result.mean_reward, result.truncated_share) == (1.0, 0.25)
    assert result.majority == 0.0  # "b", four times, is wrong
    assert result.num_unique_correct == 3 * 3  # a, c and the one that names no answer
    assert result.intervals["pass_at_8"][1] == 1.0 and result.intervals["majority"][0] == 0.0
    assert len(set(seeds)) == 3
    assert result.rollouts == ({"id": "0"}, {"id": "1"})
