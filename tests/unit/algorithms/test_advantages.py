"""Advantages, budgets and importance weights."""

import math

import pytest
import torch

from quatro_ray.algorithms import advantages, importance
from quatro_ray.algorithms.kl_budget import headroom, kl_budget


def test_group_normalised_golden() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    out = advantages.group_normalised(rewards, torch.ones(2, 4, dtype=torch.bool))
    assert out[0].tolist() == pytest.approx([1, -1, -1, 1], abs=1e-5)
    assert out[1].tolist() == [0, 0, 0, 0]


def test_group_centred_golden_in_a_ragged_group() -> None:
    valid = torch.tensor([[True, True, True, False]])
    out = advantages.group_centred(torch.tensor([[1.0, 0.0, 0.5, 9.0]]), valid)
    assert out[0].tolist() == [0.5, -0.5, 0.0, 0.0]


def quatro(rewards: torch.Tensor, log_ratio: torch.Tensor, stabilizer: str) -> advantages.QuatroAdvantages:
    valid = torch.ones(rewards.shape, dtype=torch.bool)
    return advantages.quatro(rewards, valid, log_ratio, kl_budget_nats=0.1, max_eta=2.0, stabilizer=stabilizer)  # type: ignore[arg-type]


def test_on_policy_residuals_are_centred_targets() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    result = quatro(rewards, torch.zeros(1, 4), "always")
    target = result.solution.target_log_ratio
    torch.testing.assert_close(result.advantage, target - target.mean())
    assert float(result.advantage.sum()) == pytest.approx(0, abs=1e-12)


def test_stabiliser_turns_the_push_once_a_sample_is_past_its_target() -> None:
    rewards = torch.tensor([[1.0, 0.0]])
    assert quatro(rewards, torch.zeros(1, 2), "always").advantage[0, 0] > 0
    assert quatro(rewards, torch.tensor([[3.0, 0.0]]), "always").advantage[0, 0] < 0


def test_active_stabiliser_acts_only_beyond_the_budget() -> None:
    rewards = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    log_ratio = torch.tensor([[0.1, -0.1], [2.0, -2.0]])
    result = quatro(rewards, log_ratio, "active")
    centred = quatro(rewards, torch.zeros(2, 2), "active").advantage
    assert result.realised_kl_nats[0] < 0.1 < result.realised_kl_nats[1]
    torch.testing.assert_close(result.advantage[0], centred[0])
    torch.testing.assert_close(result.advantage[1], centred[1] - log_ratio[1].double())


def test_realised_kl_golden() -> None:
    """mean(ρ − 1 − log ρ) of ρ = e and ρ = 1."""
    got = advantages.realised_kl(torch.tensor([[1.0, 0.0]]), torch.ones(1, 2, dtype=torch.bool))
    assert float(got[0]) == pytest.approx((math.e - 2) / 2, rel=1e-6)


def test_first_order_eta_golden() -> None:
    """√(2·0.5) = 1 over std ½, over std 0 and over std 0.05; capped at 8."""
    rewards = torch.tensor([[1.0, 0.0, 0.5], [1.0, 1.0, 0.5], [0.6, 0.5, 9.0]])
    valid = torch.tensor([[True, True, False]] * 3)
    assert advantages.first_order_eta(rewards, valid, 0.5, 8.0).tolist() == pytest.approx([2.0, 8.0, 8.0])
    assert advantages.first_order_eta(rewards, valid, 0.5, 99.0).tolist() == pytest.approx([2.0, 99.0, 20.0], rel=1e-5)


def test_rare_failures_are_pushed_no_harder_than_rare_successes() -> None:
    """Exactly solved they would be: one failure in 16 has a KL of at most log(16/15) = 0.065."""
    rewards = torch.zeros(2, 16)
    rewards[0, 0], rewards[1, 1:] = 1, 1
    valid = torch.ones(2, 16, dtype=torch.bool)
    arguments = {"kl_budget_nats": 0.14, "stabilizer": "always"}
    bound = advantages.first_order_eta(rewards, valid, 0.14, 8.0)
    exact = advantages.quatro(rewards, valid, torch.zeros(2, 16), max_eta=8.0, **arguments)  # type: ignore[arg-type]
    capped = advantages.quatro(rewards, valid, torch.zeros(2, 16), max_eta=bound, **arguments)  # type: ignore[arg-type]
    assert exact.solution.eta[1] > 4 * exact.solution.eta[0]
    assert capped.solution.eta[0] == exact.solution.eta[0]
    assert capped.solution.eta[1] == bound[1] < 2 * exact.solution.eta[0]


def budget(**changes: object) -> list[float]:
    arguments = {
        "unit": "response",
        "staleness_exponent": 0.0,
        "shrink_by_ess": False,
        "headroom_exponent": 0.0,
        "rewards": torch.tensor([[1.0, 0.0], [1.0, 0.0]]),
        "lengths": torch.tensor([[2, 4], [6, 0]]),
        "staleness": torch.tensor([0.0, 3.0]),
        "sequence_log_ratio": torch.tensor([[0.0, math.log(3)], [500.0, 0.0]]),
        "valid": torch.tensor([[True, True], [True, False]]),
    }
    return kl_budget(0.5, **(arguments | changes)).tolist()  # type: ignore[arg-type]


def test_kl_budget_golden() -> None:
    assert budget() == [0.5, 0.5]
    assert budget(unit="token") == [1.5, 3.0]  # mean lengths 3 and 6
    assert budget(staleness_exponent=0.5) == [0.5, 1.0]  # (1 + 3)^½ = 2
    # weights 1 and 3: 16/(2·10) = 0.8; a group of one has all of its sample, however large its weight
    assert budget(shrink_by_ess=True) == pytest.approx([0.4, 0.5])


def test_headroom_gives_hard_queries_room_and_takes_none_from_easy_ones() -> None:
    rewards = torch.zeros(4, 8)
    rewards[0, 0], rewards[1, :6], rewards[2] = 1, 1, 0.3  # one right of 8, six of 8, all alike
    rewards[3, :3] = torch.tensor([2.0, -2.0, 1.0])  # graded; 3 rollouts
    valid = torch.ones(4, 8, dtype=torch.bool)
    valid[3, 3:] = False
    assert headroom(rewards, valid).tolist() == pytest.approx([7 / 8, 2 / 8, 0, (2 - 1 / 3) / 4])
    shapes = {"lengths": torch.ones(4, 8), "staleness": torch.zeros(4), "sequence_log_ratio": torch.zeros(4, 8)}
    got = budget(headroom_exponent=2.0, rewards=rewards, valid=valid, **shapes)
    assert got == pytest.approx([0.5 * 1.75**2, 0.5, 0.5, 0.5])


def test_importance_levels() -> None:
    """Two rollouts of two tokens and one padding token."""
    log_ratio = torch.tensor([0.2, 0.4, -1.0, 0.0, 0.0])
    response = torch.tensor([True, True, True, True, False])
    index = torch.tensor([0, 0, 1, 1, -1])
    args = (log_ratio, response, index, 2)
    assert importance.leveled("token", *args).tolist() == log_ratio.tolist()
    assert importance.leveled("sequence", *args).tolist() == pytest.approx([0.6, 0.6, -1, -1, 0])
    assert importance.leveled("geometric", *args).tolist() == pytest.approx([0.3, 0.3, -0.5, -0.5, 0])


def test_effective_sample_share() -> None:
    everything = torch.ones(5, dtype=torch.bool)
    assert float(importance.effective_sample_share(torch.ones(5), everything)) == pytest.approx(1)
    assert float(importance.effective_sample_share(torch.tensor([1.0, 0, 0, 0]), everything[:4])) == pytest.approx(0.25)
    half = torch.tensor([True, False])
    assert float(importance.effective_sample_share(torch.tensor([2.0, 7.0]), half)) == pytest.approx(1)
