"""Confidence intervals hold as often as they say, by simulation."""

import numpy as np
import pytest
from numpy.typing import NDArray

from quatro_ray.evaluation.metrics import interval
from quatro_ray.telemetry.evaluation_result import EvaluationResult

EXACT = 0.95
DIFFICULTIES = [(0.5, 0.5), (0.1, 0.9), (0.3, 3.0), (2.0, 2.0), (20.0, 20.0), (1.0, 30.0)]
"""Beta distributions of the questions' rates of success, from "either always or never" to "all alike"."""


def held(rng: np.random.Generator, num: int, samples: int, a: float, b: float) -> bool:
    rates: NDArray[np.float64] = rng.binomial(samples, rng.beta(a, b, num)) / samples
    low, high = interval(rates.tolist())
    return low <= a / (a + b) <= high


@pytest.mark.parametrize("num", [15, 30, 128])
@pytest.mark.parametrize("samples", [1, 16])
def test_intervals_hold(num: int, samples: int) -> None:
    """Each of 2,400 draws; three standard errors of a share of 0.95 of 400 are 0.033."""
    rng = np.random.default_rng(0)
    share = [np.mean([held(rng, num, samples, a, b) for _ in range(400)]) for a, b in DIFFICULTIES]
    assert min(share) > EXACT - 0.04
    assert np.mean(share) > EXACT - 0.005


def test_two_standard_errors_do_not_hold_for_hard_questions() -> None:
    """Of 15 questions with a mean rate of 0.024, one sample each."""
    rng = np.random.default_rng(0)
    plain = []
    for _ in range(400):
        rates = rng.binomial(1, rng.beta(0.05, 2.0, 15)).astype(float)
        plain.append(abs(rates.mean() - 0.05 / 2.05) <= 2 * rates.std(ddof=1) / np.sqrt(15))
    assert np.mean(plain) < 0.5
    assert np.mean([held(rng, 15, 1, 0.05, 2.0) for _ in range(400)]) > EXACT - 0.04


def test_all_wrong_is_not_certain() -> None:
    """Of 15 questions: the rule of three says about 3/15; the exact limit is 1 − 0.025^(1/15)."""
    low, high = interval([0.0] * 15)
    assert low == 0.0 and high == pytest.approx(1 - 0.025 ** (1 / 15))
    assert interval([1.0] * 15) == pytest.approx((0.025 ** (1 / 15), 1.0))
    assert interval([0.25]) == pytest.approx((0.0, 0.99), abs=0.02)  # one question says nothing


def test_it_is_narrow_where_all_questions_are_alike() -> None:
    """An interval for coin flips would be ± 0.18 for 30 questions; these vary less."""
    low, high = interval([0.5, 0.55, 0.45] * 10)
    assert 0.48 < low < 0.5 < high < 0.52


def test_a_result_of_an_older_run_is_read() -> None:
    old = {"name": "sums", "version": 1, "step": 1, "num_queries": 4, "samples_per_query": 2, "pass_at": {"1": 0.5}}
    rest = {"pass_at_1_error": 0.1, "majority": 0.5, "num_unique_correct": 1, "mean_reward": 0.5}
    result = EvaluationResult.from_dict(old | rest | {"truncated_share": 0.0, "num_tokens": 8, "rollouts": ()})
    assert result.line() == "pass@1 0.500  maj@2 0.500  (sums, 4 held-out questions)"
    assert EvaluationResult.from_dict(result.to_dict()) == result
