"""Advantages, budgets and importance weights."""

import math

import pytest
import torch

from quatro_ray.algorithms import advantages, importance
from quatro_ray.algorithms.trust_region import Status


def test_group_normalised_golden() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    out = advantages.group_normalised(rewards, torch.ones(2, 4, dtype=torch.bool))
    assert out[0].tolist() == pytest.approx([1, -1, -1, 1], abs=1e-5)
    assert out[1].tolist() == [0, 0, 0, 0]


def test_group_centred_golden_in_a_ragged_group() -> None:
    valid = torch.tensor([[True, True, True, False]])
    out = advantages.group_centred(torch.tensor([[1.0, 0.0, 0.5, 9.0]]), valid)
    assert out[0].tolist() == [0.5, -0.5, 0.0, 0.0]


def quatro(rewards: torch.Tensor, share: float = 0.3) -> advantages.QuatroAdvantages:
    return advantages.quatro(rewards, torch.ones(rewards.shape, dtype=torch.bool), tilt_share=share)


def binary(successes: int, group_size: int = 16) -> torch.Tensor:
    return (torch.arange(group_size) < successes).double()[None]


def test_advantages_are_centred_targets_that_meet_their_budget() -> None:
    result = quatro(torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
    target = result.solution.target_log_ratio
    torch.testing.assert_close(result.advantage, target - target.mean())
    assert float(result.solution.kl_nats) == pytest.approx(0.3 * math.log(4), rel=1e-8)


def test_every_informative_query_is_active() -> None:
    """Lengths and staleness are not even arguments; no reward scale or success rate makes the cap bind."""
    for successes in range(1, 16):
        for scale in (1e-3, 1.0, 1e6):
            assert quatro(scale * binary(successes)).solution.status.tolist() == [Status.ACTIVE]
    assert quatro(binary(16)).solution.status.tolist() == [Status.VOID]
    graded = torch.rand(50, 16, generator=torch.Generator().manual_seed(0))
    assert set(quatro(graded).solution.status.tolist()) == {Status.ACTIVE}


def test_scale_and_shift_of_rewards_change_nothing() -> None:
    rewards = torch.rand(20, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = quatro(rewards).advantage
    for scale, shift in ((1e-3, 0.0), (1e6, 0.0), (1.0, 5.0), (7.0, -3.0)):
        torch.testing.assert_close(quatro(scale * rewards + shift).advantage, expected, rtol=1e-6, atol=1e-9)


def test_rounding_is_no_preference() -> None:
    rewards = torch.tensor([[0.1 + 0.2, 0.3, 0.3, 0.3], [1.0, 0.1 + 0.2, 0.3, 0.3]], dtype=torch.float64)
    result = quatro(rewards)
    assert result.solution.status.tolist() == [Status.VOID, Status.ACTIVE]
    assert result.advantage[0].tolist() == [0.0] * 4


def test_nearly_equal_best_rewards_meet_the_cap() -> None:
    """With κ = 0.9 nearly all weight must go to one of two rewards that differ by 1e-8."""
    rewards = torch.tensor([[1.0, 1.0 - 1e-8, 0.0, 0.0]], dtype=torch.float64)
    result = quatro(rewards, share=0.9)
    assert result.solution.status.tolist() == [Status.SLACK]
    assert float(result.advantage.max() - result.advantage.min()) == pytest.approx(20.0)


def test_hard_queries_are_pushed_harder_than_easy_ones() -> None:
    """1 right of 16 is the mirror image of 15 right of 16: GRPO weighs them the same."""
    hard, even, easy = (float(quatro(binary(k)).advantage.square().mean().sqrt()) for k in (1, 8, 15))
    assert 0.2 * even < 2 * easy < hard < 1.1 * even


def test_tilt_budget_is_a_share_of_what_the_group_allows() -> None:
    rewards = torch.tensor([[1.0, 0, 0, 0], [1, 1, 0, 0], [0.2, 0.9, 0.9, 5.0], [2, 2, 2, 2]])
    valid = torch.tensor([[True] * 4, [True] * 4, [True, True, True, False], [True] * 4])
    expected = [0.5 * math.log(4), 0.5 * math.log(2), 0.5 * math.log(3 / 2), 0.0]
    assert advantages.tilt_budget(rewards, valid, 0.5).tolist() == pytest.approx(expected)


def test_token_drift_estimates_a_kl_and_no_single_token_decides_it() -> None:
    torch.manual_seed(0)
    behavior, policy = torch.log_softmax(torch.randn(2, 5, dtype=torch.float64) * 0.2, dim=-1)
    tokens = torch.multinomial(behavior.exp(), 200_000, replacement=True)
    exact = float((behavior.exp() * (behavior - policy)).sum())
    assert float(importance.token_drift((policy - behavior)[tokens]).mean()) == pytest.approx(exact, rel=0.1)
    far = importance.token_drift(torch.tensor([12.0, -12.0, 0.0]))
    assert far.tolist() == pytest.approx([72.0, 11.0, 0.0], rel=1e-5)


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
