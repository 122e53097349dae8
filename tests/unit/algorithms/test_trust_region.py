"""The solver against closed forms, an independent root finder, and the facts of docs/algorithm.md."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq, minimize, minimize_scalar

from quatro_ray.algorithms import trust_region
from quatro_ray.algorithms.trust_region import Status, solve


def everything(rewards: torch.Tensor) -> torch.Tensor:
    return torch.ones(rewards.shape, dtype=torch.bool)


def kl_of_eta(eta: float, rewards: np.ndarray) -> float:
    """KL(w ‖ uniform), written another way than in the solver."""
    z = eta * (rewards - rewards.max())
    w = np.exp(z) / np.exp(z).sum()
    return float(np.log(len(rewards)) + (w * np.log(np.maximum(w, 1e-300))).sum())


def precise_kl(eta: torch.Tensor, rewards: torch.Tensor, base: torch.Tensor | None = None) -> np.ndarray:
    """KL(w ‖ b) [Q] in 80-bit floats; at ε = 1e-8 float64 would itself cancel."""
    r, b = rewards.double().numpy(), np.ones(rewards.shape) if base is None else base.double().numpy()
    r, b = r.astype(np.longdouble), b.astype(np.longdouble)
    b = b / b.sum(1, keepdims=True)
    z = eta.numpy().astype(np.longdouble)[:, None] * (r - np.where(b > 0, r, -np.inf).max(1, keepdims=True))
    z = np.where(b > 0, z, -np.inf)
    total = (b * np.exp(z)).sum(1)
    return (b * np.exp(z) * np.where(b > 0, z, 0)).sum(1) / total - np.log(total)


def random_rewards(kind: str, shape: tuple[int, int], seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    normal = rng.normal(size=shape)
    rewards = {
        "continuous": lambda: normal,
        "heavy-tailed": lambda: rng.standard_cauchy(size=shape),
        "tied": lambda: np.round(normal),
        "binary": lambda: (normal > 0.8).astype(float),
        "tiny": lambda: 1e-12 * normal,
        "huge and negative": lambda: 1e12 * (normal - 100),
        "all scales": lambda: normal * 10.0 ** rng.uniform(-12, 12, size=shape),
        "rare": lambda: np.where(np.arange(shape[1]) == 0, 1e6, 1e-6 * normal),
    }
    return torch.tensor(rewards[kind]())


KINDS = ["continuous", "heavy-tailed", "tied", "binary", "tiny", "huge and negative", "all scales", "rare"]


@pytest.mark.parametrize("budget", [1e-8, 1e-4, 0.01, 0.1, 0.6, 1.2])
@pytest.mark.parametrize(("successes", "group"), [(1, 2), (1, 4), (2, 4), (1, 16), (8, 16), (15, 16), (3, 64)])
def test_binary_rewards_have_the_closed_form(budget: float, successes: int, group: int) -> None:
    rewards = torch.zeros(1, group)
    rewards[0, :successes] = 1
    solution = solve(rewards, everything(rewards), budget, 50.0)
    p, eta = successes / group, float(solution.eta[0])
    m = p * math.exp(eta) / (p * math.exp(eta) + 1 - p)
    kl = m * math.log(m / p) + (1 - m) * math.log((1 - m) / (1 - p)) if m < 1 else math.log(1 / p)
    if budget < math.log(1 / p):
        assert solution.status[0] == Status.ACTIVE
        assert kl == pytest.approx(budget, rel=1e-6, abs=1e-14)
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


@pytest.mark.parametrize("kind", KINDS)
def test_the_kl_meets_budgets_of_any_size(kind: str) -> None:
    """Thousands of groups, budgets from 1e-8 to 1 nat side by side; checked in higher precision."""
    rewards = random_rewards(kind, (2000, 16))
    budgets = 10 ** (torch.rand(2000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * -8)
    solution = solve(rewards, everything(rewards), budgets, 1e30)
    active, slack = solution.status == Status.ACTIVE, solution.status == Status.SLACK
    reached = torch.tensor(precise_kl(solution.eta, rewards).astype(float))
    assert active.sum() > 1000
    torch.testing.assert_close(reached[active], budgets[active], rtol=1e-8, atol=0)
    torch.testing.assert_close(reached[slack], solution.kl_nats[slack], rtol=1e-8, atol=1e-14)
    assert (reached[slack] <= budgets[slack] * (1 + 1e-8)).all()
    mass = torch.exp(solution.target_log_ratio).mean(1)
    torch.testing.assert_close(mass, torch.ones(2000, dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", ["continuous", "heavy-tailed", "tied", "binary"])
@pytest.mark.parametrize("budget", [1e-4, 0.05, 1.0])
def test_agrees_with_an_independent_root_finder(kind: str, budget: float) -> None:
    rewards = random_rewards(kind, (200, 16), seed=1)
    solution = solve(rewards, everything(rewards), budget, 1e4)
    for query in (solution.status == Status.ACTIVE).nonzero().squeeze(1).tolist():
        r = rewards[query].numpy()
        eta = brentq(lambda x, r=r: kl_of_eta(x, r) - budget, 0, 1e4, xtol=1e-14, rtol=1e-13)
        assert float(solution.eta[query]) == pytest.approx(eta, rel=1e-6)
    assert (solution.status == Status.ACTIVE).any()


@pytest.mark.parametrize("budget", [0.01, 0.1, 0.6])
@pytest.mark.parametrize("kind", ["continuous", "heavy-tailed", "tied"])
def test_reaches_the_minimum_of_the_convex_dual(kind: str, budget: float) -> None:
    """Strong duality: E_w[r] = min over λ of λε + λ log mean exp(r/λ)."""
    rewards = random_rewards(kind, (300, 8), seed=2)
    solution = solve(rewards, everything(rewards), budget, 1e6)
    reached = (torch.exp(solution.target_log_ratio) * rewards).mean(1)

    def dual(log_multiplier: float, r: np.ndarray) -> float:
        multiplier = math.exp(log_multiplier)
        top = r.max()
        return top + multiplier * (budget + math.log(np.exp((r - top) / multiplier).mean()))

    for query in (solution.status == Status.ACTIVE).nonzero().squeeze(1).tolist():
        r = rewards[query].numpy()
        best = minimize_scalar(dual, args=(r,), bounds=(-12, 12), method="bounded", options={"xatol": 1e-6})
        assert float(reached[query]) == pytest.approx(best.fun, rel=1e-6, abs=1e-6)


def test_no_other_policy_in_the_region_earns_more() -> None:
    """The primal problem itself, over the simplex, by a general convex solver."""
    rewards = random_rewards("continuous", (25, 6), seed=3)
    solution = solve(rewards, everything(rewards), 0.2, 1e6)
    for query in range(25):
        r = rewards[query].numpy()
        found = minimize(
            lambda w, r=r: -w @ r,
            np.full(6, 1 / 6),
            jac=lambda w, r=r: -r,
            bounds=[(1e-12, 1)] * 6,
            constraints=[
                {"type": "eq", "fun": lambda w: w.sum() - 1},
                {"type": "ineq", "fun": lambda w: 0.2 - (w * np.log(6 * w)).sum()},
            ],
            options={"ftol": 1e-12, "maxiter": 300},
        )
        weights = torch.exp(solution.target_log_ratio[query]).numpy() / 6
        assert float(weights @ r) == pytest.approx(-found.fun, rel=1e-6)
        np.testing.assert_allclose(weights, found.x, atol=1e-3)


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


@pytest.mark.parametrize("budget", [1e-8, 1e-3, 0.5])
def test_base_weights_of_very_different_size(budget: float) -> None:
    """Importance weights: some 0, some down to 1e-30, none of them normalised."""
    rng = np.random.default_rng(0)
    rewards = torch.tensor(rng.normal(size=(500, 8)))
    weights = torch.tensor(10.0 ** rng.uniform(-30, 3, size=(500, 8)) * (rng.random((500, 8)) > 0.2))
    weights[:, 0] = 1
    solution = solve(rewards, everything(rewards), budget, 1e9, weights)
    active = solution.status == Status.ACTIVE
    reached = torch.tensor(precise_kl(solution.eta, rewards, weights).astype(float))
    assert active.sum() > 300
    torch.testing.assert_close(reached[active], torch.full_like(reached[active], budget), rtol=1e-8, atol=0)
    assert (solution.target_log_ratio[weights == 0] == 0).all()


def test_weight_zero_is_as_good_as_invalid() -> None:
    rewards = torch.tensor([[0.3, 1.0, 0.0, 99.0], [1.0, 2.0, 3.0, -5.0]])
    used = torch.tensor([[True, True, True, False]] * 2)
    a, b = solve(rewards, everything(rewards), 0.2, 9.0, used.double()), solve(rewards, used, 0.2, 9.0)
    torch.testing.assert_close(a.target_log_ratio, b.target_log_ratio)
    torch.testing.assert_close(a.eta, b.eta)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int64])
def test_any_dtype_is_computed_in_float64(dtype: torch.dtype) -> None:
    rewards = (10 * random_rewards("continuous", (50, 8))).to(dtype)
    a, b = solve(rewards, everything(rewards), 1e-7, 1e3), solve(rewards.double(), everything(rewards), 1e-7, 1e3)
    assert a.eta.dtype == a.target_log_ratio.dtype == a.kl_nats.dtype == torch.float64
    assert a.status.dtype == torch.int8
    torch.testing.assert_close(a.target_log_ratio, b.target_log_ratio, rtol=0, atol=0)


@pytest.mark.parametrize("cap", [1e-300, 1e-3, 1.0, 1e300])
@pytest.mark.parametrize("span", [5e-324, 1e-310, 1.0, 1e12, 1e300])
def test_extreme_caps_and_spans_stay_finite(cap: float, span: float) -> None:
    rewards = torch.tensor([[0.0, span, 0.0, span], [0.0, 0.0, 0.0, span]], dtype=torch.float64)
    solution = solve(rewards, everything(rewards), torch.tensor([1e-8, 0.3]), cap)
    assert torch.isfinite(solution.target_log_ratio).all()
    assert ((solution.eta > 0) & (solution.eta <= cap)).all()
    assert (solution.kl_nats <= torch.tensor([1e-8, 0.3]) * (1 + 1e-8)).all()
    assert (solution.eta[solution.status == Status.SLACK] == cap).all()


def test_a_budget_that_no_policy_can_reach_is_slack() -> None:
    """log 1/p is the supremum, approached and never reached; just inside it there is a root."""
    rewards = torch.tensor([[0.0, 1.0]] * 3, dtype=torch.float64)
    solution = solve(
        rewards, everything(rewards), math.log(2) * torch.tensor([1 - 1e-6, 1 + 1e-6, 2.0], dtype=torch.float64), 1e3
    )
    assert solution.status.tolist() == [Status.ACTIVE, Status.SLACK, Status.SLACK]
    assert float(solution.kl_nats[0]) == pytest.approx(math.log(2) * (1 - 1e-6), rel=1e-8)


@pytest.mark.parametrize("budget", [1e-8, 0.1, 1.0])
def test_blocks_and_neighbours_change_nothing(budget: float, monkeypatch: pytest.MonkeyPatch) -> None:
    rewards, valid = random_rewards("heavy-tailed", (97, 16)), torch.arange(16) < torch.arange(97)[:, None] % 16 + 1
    whole = solve(rewards, valid, budget, 1e6)
    monkeypatch.setattr(trust_region, "_CPU_BLOCK", 160)
    parts = solve(rewards, valid, budget, 1e6)
    torch.testing.assert_close(whole.target_log_ratio, parts.target_log_ratio, rtol=1e-7, atol=1e-12)
    assert (whole.status == parts.status).all()
    assert (whole.target_log_ratio[~valid] == 0).all()


def test_no_queries_give_an_empty_solution() -> None:
    solution = solve(torch.zeros(0, 4), torch.ones(0, 4, dtype=torch.bool), 0.1, 2.0)
    assert solution.eta.shape == solution.status.shape == (0,)
    assert solution.target_log_ratio.shape == (0, 4)


def test_no_gradient_passes_through() -> None:
    rewards = torch.randn(3, 4, requires_grad=True)
    assert not solve(rewards, everything(rewards), 0.1, 2.0).target_log_ratio.requires_grad


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_same() -> None:
    rewards = random_rewards("continuous", (1000, 16))
    here, there = (solve(r, everything(r).to(r.device), 0.1, 1e6) for r in (rewards, rewards.cuda()))
    torch.testing.assert_close(here.target_log_ratio, there.target_log_ratio.cpu(), rtol=1e-8, atol=1e-12)


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


@pytest.mark.parametrize("rewards", [[[0.0, 1.0], [0.0, -math.inf]], [[0.0, 1.0], [-1.7e308, 1.7e308]]])
def test_rewards_beyond_float64_name_the_query(rewards: list) -> None:
    with pytest.raises(ValueError, match="query 1"):
        solve(torch.tensor(rewards, dtype=torch.float64), torch.ones(2, 2, dtype=torch.bool), 0.1, 2.0)


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf])
def test_bad_base_weights_name_the_query(weight: float) -> None:
    rewards, weights = torch.tensor([[0.0, 1.0]] * 2), torch.tensor([[1.0, 1.0], [1.0, weight]])
    with pytest.raises(ValueError, match="query 1 has a base weight"):
        solve(rewards, everything(rewards), 0.1, 2.0, weights)
    with pytest.raises(ValueError, match="query 0 has no valid sample"):
        solve(rewards, everything(rewards), 0.1, 2.0, torch.zeros(2, 2))


def test_nan_outside_the_group_is_not_read() -> None:
    rewards = torch.tensor([[0.0, 1.0, math.nan]])
    solution = solve(rewards, torch.tensor([[True, True, False]]), 0.1, 2.0)
    assert torch.isfinite(solution.target_log_ratio).all()


def test_wrong_shapes_name_the_argument() -> None:
    rewards = torch.tensor([[0.0, 1.0]] * 3)
    with pytest.raises(ValueError, match="kl_budget_nats must be"):
        solve(rewards, everything(rewards), torch.full((2,), 0.1), 2.0)
    with pytest.raises(ValueError, match="base_weights must be"):
        solve(rewards, everything(rewards), 0.1, 2.0, torch.ones(3))
    with pytest.raises(ValueError, match="rewards and valid"):
        solve(rewards, torch.ones(3, 1, dtype=torch.bool), 0.1, 2.0)
    with pytest.raises(ValueError, match="query 0 has no valid sample"):
        solve(torch.zeros(2, 0), torch.ones(2, 0, dtype=torch.bool), 0.1, 2.0)


def test_the_cap_must_be_finite() -> None:
    with pytest.raises(ValueError, match="max_eta"):
        solve(torch.tensor([[0.0, 1.0]]), torch.ones(1, 2, dtype=torch.bool), 0.1, math.inf)
