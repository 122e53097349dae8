"""Losses, advantages, importance weights, aggregation: golden values by hand, gradients by numbers."""

import math

import pytest
import torch

from quatro_ray.ops import advantages, importance, losses
from quatro_ray.ops.aggregation import aggregate


def test_quatro_loss_golden_and_gradient() -> None:
    logprobs = torch.tensor([-1.0, -2.0], dtype=torch.float64, requires_grad=True)
    loss = losses.quatro(logprobs, torch.tensor([0.5, -1.0]), torch.tensor([2.0, 0.25]))
    assert loss.tolist() == [1.0, -0.5]
    loss.sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [-1.0, 0.25]  # −w A


def test_grpo_golden() -> None:
    """ρ = 1.5 with A = 1 is clipped at 1.2; with A = −1 it is not, since the minimum is the pessimist."""
    policy = torch.log(torch.tensor([1.5, 1.5, 0.5, 0.5]))
    loss = losses.grpo(policy, torch.zeros(4), torch.tensor([1.0, -1.0, 1.0, -1.0]), clip_low=0.2, clip_high=0.2)
    assert loss.tolist() == pytest.approx([-1.2, 1.5, -0.5, 0.8])


@pytest.mark.parametrize("advantage", [0.7, -0.7])
@pytest.mark.parametrize("ratio", [0.6, 0.95, 1.05, 1.5])
def test_grpo_gradient_by_numbers(advantage: float, ratio: float) -> None:
    policy = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    args = (torch.zeros(1, dtype=torch.float64), torch.tensor([advantage], dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda x: losses.grpo(x, *args, clip_low=0.2, clip_high=0.2), policy)


def test_reference_kl_golden_and_gradient() -> None:
    policy = torch.tensor([-1.0], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([-1.5], dtype=torch.float64)
    assert losses.reference_kl(policy, reference).item() == pytest.approx(math.exp(-0.5) + 0.5 - 1)
    assert torch.autograd.gradcheck(lambda x: losses.reference_kl(x, reference), policy)


def test_group_normalised_golden() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    out = advantages.group_normalised(rewards, torch.ones(2, 4, dtype=torch.bool))
    assert out[0].tolist() == pytest.approx([1, -1, -1, 1], abs=1e-5)
    assert out[1].tolist() == [0, 0, 0, 0]


def quatro(rewards: torch.Tensor, log_ratio: torch.Tensor, stabilizer: str) -> advantages.QuatroAdvantages:
    valid = torch.ones(rewards.shape, dtype=torch.bool)
    return advantages.quatro(rewards, valid, log_ratio, kl_budget_nats=0.1, max_eta=2.0, stabilizer=stabilizer)


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


def test_importance_weights_at_three_levels() -> None:
    """Two rollouts of two tokens and one padding token; ratios e^0.2, e^0.4 and e^−1, 1."""
    log_ratio = torch.tensor([0.2, 0.4, -1.0, 0.0, 0.0])
    response = torch.tensor([True, True, True, True, False])
    index = torch.tensor([0, 0, 1, 1, -1])
    args = (log_ratio, response, index, 2)
    token = importance.weights("token", 1.3, *args)[:4]
    assert token.tolist() == pytest.approx([math.exp(0.2), 1.3, math.exp(-1), 1.0])
    sequence = importance.weights("sequence", 9.0, *args)[:4]
    assert sequence.tolist() == pytest.approx([math.exp(0.6)] * 2 + [math.exp(-1)] * 2)
    geometric = importance.weights("geometric", 9.0, *args)[:4]
    assert geometric.tolist() == pytest.approx([math.exp(0.3)] * 2 + [math.exp(-0.5)] * 2)


def test_effective_sample_share() -> None:
    assert float(importance.effective_sample_share(torch.ones(5))) == pytest.approx(1)
    assert float(importance.effective_sample_share(torch.tensor([1.0, 0.0, 0.0, 0.0]))) == pytest.approx(0.25)


@pytest.mark.parametrize("mode", ["token_mean", "sequence_mean"])
@pytest.mark.parametrize("parts", [1, 2, 8])
def test_no_split_changes_the_aggregate(mode: str, parts: int) -> None:
    values = torch.arange(16, dtype=torch.float64, requires_grad=True)
    mask = torch.arange(16) % 3 > 0
    whole = aggregate(values, mask, mode, num_tokens=int(mask.sum()), num_rollouts=4)  # type: ignore[arg-type]
    (expected,) = torch.autograd.grad(whole, values)
    total = sum(
        aggregate(v, m, mode, num_tokens=int(mask.sum()), num_rollouts=4)  # type: ignore[arg-type]
        for v, m in zip(values.chunk(parts), mask.chunk(parts), strict=True)
    )
    (got,) = torch.autograd.grad(total, values)  # type: ignore[arg-type]
    torch.testing.assert_close(got, expected)
    assert float(whole.detach()) == pytest.approx(
        float(values[mask].detach().sum()) / (int(mask.sum()) if mode == "token_mean" else 4)
    )
