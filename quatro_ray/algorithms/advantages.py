"""Advantages: one number per rollout, computed from the rewards of its group.

They are computed for the global batch before any gradient, because a method needs whole groups and a micro-batch may
hold part of one; losses only look them up. Shape letters: Q queries, G rollouts of a query.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from quatro_ray.algorithms import trust_region


@dataclass(frozen=True)
class QuatroAdvantages:
    """Result of `quatro`.

    Attributes:
        advantage: float64 [Q, G], nats; 0 where invalid.
        realised_kl_nats: float64 [Q], see `realised_kl`.
        solution: the trust region's solution, from which the targets were taken.
    """

    advantage: Tensor
    realised_kl_nats: Tensor
    solution: trust_region.Solution


def group_mean(values: Tensor, valid: Tensor) -> Tensor:
    """Return the mean over each group's valid entries, [Q, G] → [Q]: the group baseline of GRPO (arXiv 2402.03300)."""
    return (values * valid).sum(1) / valid.sum(1)


def realised_kl(sequence_log_ratio: Tensor, valid: Tensor) -> Tensor:
    """Estimate KL(β ‖ π_θ) of each query by mean(ρ − 1 − log ρ) ≥ 0.

    Source: the estimator k3 of Schulman 2020, "Approximating KL divergence" (joschu.net/blog/kl-approx.html).

    Args:
        sequence_log_ratio: [Q, G], log ρ_i = log π_θ(y_i)/β(y_i), nats.
        valid: bool [Q, G].

    Returns:
        [Q], nats per response.
    """
    # the clamp keeps exp finite if a rollout has become e³⁰ times likelier, which is far outside any budget anyway
    excess = torch.expm1(sequence_log_ratio.clamp(max=30)) - sequence_log_ratio.clamp(max=30)
    return group_mean(excess, valid)


@torch.no_grad()
def quatro(
    rewards: Tensor,
    valid: Tensor,
    sequence_log_ratio: Tensor,
    *,
    kl_budget_nats: Tensor | float,
    max_eta: Tensor | float,
    stabilizer: Literal["active", "always"],
) -> QuatroAdvantages:
    """Return the residuals A_i = (t_i − mean t) − log ρ_i of QUATRO (arXiv 2602.04620): the gradient of KL(π_θ ‖ π*).

    The targets t_i of a group sum to less than zero, which would push against everything sampled; centring removes
    that. The term −log ρ_i is the stabiliser.

    Args:
        rewards: [Q, G].
        valid: bool [Q, G].
        sequence_log_ratio: [Q, G], log ρ_i = log π_θ(y_i) − log β(y_i), nats.
        kl_budget_nats: [Q] or one number, > 0, nats per response.
        max_eta: [Q] or one number, > 0, cap on η = 1/λ, in 1/reward.
        stabilizer: "always" applies −log ρ_i to every query; "active" only to queries whose realised KL exceeds
            their budget (complementary slackness), so that zero-variance groups within it get no push.
    """
    solution = trust_region.solve(rewards, valid, kl_budget_nats, max_eta)
    target = solution.target_log_ratio
    centred = target - group_mean(target, valid)[:, None]
    log_ratio = sequence_log_ratio.to(torch.float64)
    divergence = realised_kl(log_ratio, valid)
    acts = torch.ones_like(divergence) if stabilizer == "always" else (divergence > kl_budget_nats).to(torch.float64)
    advantage = torch.where(valid, centred - acts[:, None] * log_ratio, 0.0)
    return QuatroAdvantages(advantage, divergence, solution)


@torch.no_grad()
def first_order_eta(rewards: Tensor, valid: Tensor, kl_budget_nats: Tensor | float, max_eta: float) -> Tensor:
    """Return η = min(√(2ε)/std, max_eta), at which the KL to second order, η² std²/2, equals the budget ε.

    η·(r_i − mean r) is then √(2ε) times GRPO's normalised advantage. If failures are rare, the true KL of the sample
    grows more slowly than its second order, or never reaches ε, and the exact η grows without bound: nearly solved
    queries would get the largest push, on the evidence of very few failures.

    Source: second-order expansion of the KL in docs/algorithm.md; GRPO, arXiv 2402.03300, section 4.1.2.

    Args:
        rewards: [Q, G].
        valid: bool [Q, G].
        kl_budget_nats: [Q] or one number, > 0, ε in nats per response.
        max_eta: cap on η, in 1/reward.

    Returns:
        float64 [Q], 1/reward.
    """
    std = group_mean(group_centred(rewards.double(), valid).square(), valid).sqrt()
    budget = torch.as_tensor(kl_budget_nats, dtype=torch.float64, device=rewards.device)
    return ((2 * budget).sqrt() / std).clamp(max=max_eta)  # if all rewards are equal, ∞ becomes max_eta


@torch.no_grad()
def group_normalised(rewards: Tensor, valid: Tensor, epsilon: float = 1e-6) -> Tensor:
    """Return A_i = (r_i − mean r)/(std r + ε) within each group, [Q, G]; GRPO, arXiv 2402.03300, section 4.1.2."""
    centred = group_centred(rewards, valid)
    std = group_mean(centred.square(), valid).sqrt()[:, None]
    return centred / (std + epsilon)


@torch.no_grad()
def group_centred(rewards: Tensor, valid: Tensor) -> Tensor:
    """Return A_i = r_i − mean r within each group, [Q, G]; Dr. GRPO, arXiv 2503.20783, section 3.1."""
    return torch.where(valid, rewards - group_mean(rewards, valid)[:, None], 0.0)
