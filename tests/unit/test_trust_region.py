"""The solver against closed forms, an independent root finder, and the facts of docs/algorithm.md."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq

from quatro_ray.ops.trust_region import Status, solve


def everything(rewards: torch.Tensor) -> torch.Tensor:
    return torch.ones(rewards.shape, dtype=torch.bool)


def kl_of_eta(eta: float, rewards: np.ndarray) -> float:
    """KL(w ‖ uniform), written another way than in the solver."""
    z = eta * (rewards - rewards.max())
    w = np.exp(z) / np.exp(z).sum()
    return float(np.log(len(rewards)) + (w * np.log(np.maximum(w, 1e-300))).sum())


@pytest.mark.parametrize("budget", [1e-6, 1e-3, 0.1, 0.6])
@pytest.mark.parametrize(("successes", "group"), [(1, 4), (2, 4), (1, 16), (8, 16), (15, 16), (3, 64)])
def test_binary_rewards_have_the_closed_form(budget: float, successes: int, group: int) -> None:
    rewards = torch.zeros(1, group)
    rewards[0, :successes] = 1
    solution = solve(rewards, everything(rewards), budget, 50.0)
    p, eta = successes / group, float(solution.eta[0])
    m = p * math.exp(eta) / (p * math.exp(eta) + 1 - p)
    kl = m * math.log(m / p) + (1 - m) * math.log((1 - m) / (1 - p)) if m < 1 else math.log(1 / p)
    if budget < math.log(1 / p):
        assert solution.status[0] == Status.ACTIVE
        assert kl == pytest.approx(budget, rel=1e-6)
    else:
        assert solution.status[0] == Status.SLACK
        assert eta == 50.0
    target = torch.log(group * torch.softmax(eta * rewards[0].double(), 0))
    torch.testing.assert_close(solution.target_log_ratio[0], target, rtol=1e-9, atol=1e-12)


def test_golden_values_by_hand() -> None:
    """Half successes: with m = success mass, t = log 2m and log 2(1 − m); for η = 2, m = e²/(e² + 1)."""
    rewards = torch.tensor([[1.0, 0.0, 1.0, 0.0]])
    solution = solve(rewards, everything(rewards), 10.0, 2.0)  # log 2 < 10: the cap binds
    assert solution.status[0] == Status.SLACK
    m = math.exp(2) / (math.exp(2) + 1)
    expected = [math.log(2 * m), math.log(2 * (1 - m))] * 2
    assert solution.target_log_ratio[0].tolist() == pytest.approx(expected, rel=1e-12)
    assert float(solution.kl_nats[0]) == pytest.approx(m * expected[0] + (1 - m) * expected[1], rel=1e-12)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("budget", [1e-8, 1e-4, 0.05, 1.0])
def test_agrees_with_an_independent_root_finder(scale: float, budget: float) -> None:
    rng = np.random.default_rng(0)
    rewards = np.concatenate([rng.normal(size=(100, 16)), rng.standard_cauchy(size=(100, 16))])
    solution = solve(torch.tensor(rewards * scale), torch.ones(200, 16, dtype=torch.bool), budget, 1e6 / scale)
    for q in range(200):
        assert solution.status[q] == Status.ACTIVE
        assert float(solution.kl_nats[q]) == pytest.approx(budget, rel=1e-8)
        if budget >= 1e-4:  # below, the reference itself cancels
            eta = brentq(lambda x, r=rewards[q]: kl_of_eta(x, r) - budget, 0, 1e5, xtol=1e-14, rtol=1e-13)
            assert float(solution.eta[q]) * scale == pytest.approx(eta, rel=1e-6)


def test_small_budgets_give_the_normalised_advantage() -> None:
    rewards = torch.randn(20, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    solution = solve(rewards, everything(rewards), 1e-8, 1e6)
    expected = math.sqrt(2e-8) / rewards.std(1, correction=0)
    torch.testing.assert_close(solution.eta, expected, rtol=1e-3, atol=0)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-100, 100), min_size=2, max_size=12),
    st.floats(1e-6, 1.0),
    st.floats(-1e3, 1e3),
    st.floats(1e-3, 1e3),
)
def test_shift_and_scale_change_nothing_but_eta(values: list[float], budget: float, shift: float, scale: float) -> None:
    rewards = torch.tensor([values], dtype=torch.float64)
    moved = rewards * scale + shift
    if float(rewards.max() - rewards.min()) < 1e-3:  # the shift would round the differences away
        return
    cap = 1e3 / float(rewards.max() - rewards.min())
    a = solve(rewards, everything(rewards), budget, cap)
    b = solve(moved, everything(moved), budget, cap / scale)
    torch.testing.assert_close(a.target_log_ratio, b.target_log_ratio, rtol=1e-5, atol=1e-6)


def test_kl_and_eta_grow_with_the_budget() -> None:
    rewards = torch.randn(1, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).expand(50, 16)
    budgets = torch.logspace(-8, 0, 50, dtype=torch.float64)
    solution = solve(rewards, everything(rewards), budgets, 1e9)
    assert (solution.eta.diff() > 0).all()
    torch.testing.assert_close(solution.kl_nats, budgets, rtol=1e-8, atol=0)


def test_zero_variance_and_single_samples_are_void() -> None:
    rewards = torch.tensor([[1.0, 1.0, 1.0], [0.0, 5.0, 5.0], [7.0, 0.0, 0.0]])
    valid = torch.tensor([[True] * 3, [True] * 3, [True, False, False]])
    solution = solve(rewards, valid, 0.1, 2.0)
    assert solution.status.tolist() == [Status.VOID, Status.ACTIVE, Status.VOID]
    assert solution.target_log_ratio[[0, 2]].abs().max() == 0
    assert solution.kl_nats[[0, 2]].tolist() == [0.0, 0.0]


def test_invalid_entries_change_nothing() -> None:
    rewards = torch.tensor([[0.3, 1.0, 0.0, 99.0]])
    valid = torch.tensor([[True, True, True, False]])
    padded, plain = solve(rewards, valid, 0.2, 9.0), solve(rewards[:, :3], valid[:, :3], 0.2, 9.0)
    torch.testing.assert_close(padded.target_log_ratio[:, :3], plain.target_log_ratio)
    assert padded.target_log_ratio[0, 3] == 0


def test_base_weights_count_as_repeated_samples() -> None:
    rewards, weights = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 3.0]])
    weighted = solve(rewards, everything(rewards), 0.1, 9.0, weights)
    repeated = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(weighted.eta, solve(repeated, everything(repeated), 0.1, 9.0).eta)


@pytest.mark.parametrize(
    ("rewards", "valid", "budget", "message"),
    [
        ([[0.0, 1.0], [math.nan, 1.0]], [[1, 1], [1, 1]], 0.1, "query 1 has a reward that is NaN"),
        ([[0.0, math.inf]], [[1, 1]], 0.1, "query 0 has a reward"),
        ([[0.0, 1.0], [0.0, 1.0]], [[1, 1], [0, 0]], 0.1, "query 1 has no valid sample"),
        ([[0.0, 1.0]], [[1, 1]], 0.0, "query 0 has a kl_budget_nats"),
        ([[0.0, 1.0]], [[1, 1]], -1.0, "query 0 has a kl_budget_nats"),
    ],
)
def test_bad_input_names_the_query(rewards: list, valid: list, budget: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        solve(torch.tensor(rewards), torch.tensor(valid, dtype=torch.bool), budget, 2.0)


def test_the_cap_must_be_finite() -> None:
    with pytest.raises(ValueError, match="max_eta"):
        solve(torch.tensor([[0.0, 1.0]]), torch.ones(1, 2, dtype=torch.bool), 0.1, math.inf)
