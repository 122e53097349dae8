"""From rewards to one number per rollout. Shape letters: Q queries, G rollouts of a query.

A method that pushes by t_i needs the whole group at once; a micro-batch may hold only a part of it.
So advantages are computed for the global batch before any gradient, and losses only look them up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from quatro_ray.algorithms import trust_region


@dataclass(frozen=True)
class QuatroAdvantages:
    """`advantage` [Q, G]; realised_kl_nats [Q]: mean over the group of ρ − 1 − log ρ; solution: of the solver."""

    advantage: Tensor
    realised_kl_nats: Tensor
    solution: trust_region.Solution


def group_mean(values: Tensor, valid: Tensor) -> Tensor:
    """[Q, G] → [Q], over valid entries."""
    return (values * valid).sum(1) / valid.sum(1)


def realised_kl(sequence_log_ratio: Tensor, valid: Tensor) -> Tensor:
    """[Q]: the estimate mean(ρ − 1 − log ρ) ≥ 0 of KL(β ‖ π_θ) for each query, nats per response."""
    # the bound keeps exp finite where a rollout has become e³⁰ times likelier: far outside any budget all the same
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
    """Residuals A_i = (t_i − mean t) − log ρ_i, QUATRO (arXiv 2602.04620), the gradient of KL(π_θ ‖ π*).

    The targets of a group sum to less than zero, a push against everything sampled: centring removes it.
    −log ρ_i is the stabiliser. With "active" it acts only for queries whose realised divergence exceeds
    their budget (complementary slackness); zero-variance groups inside it are left alone.

    Args:
        rewards: [Q, G]; valid: bool [Q, G]; sequence_log_ratio: [Q, G], log π_θ(y_i) − log β(y_i).
        kl_budget_nats: [Q] or one number, > 0, nats per response. max_eta: likewise, 1/reward.
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
    """min(√(2ε)/std, max_eta), [Q]: the η of a quadratic KL, at which GRPO's normalised advantage sits.

    Where failures are rare the true KL of the sample grows more slowly than that, or stops short of ε, and the exact
    η runs off: nearly solved queries would be pushed hardest. The std of so few failures is no licence for it.
    """
    std = group_mean(group_centred(rewards.double(), valid).square(), valid).sqrt()
    budget = torch.as_tensor(kl_budget_nats, dtype=torch.float64, device=rewards.device)
    return ((2 * budget).sqrt() / std).clamp(max=max_eta)  # ∞ where all rewards are equal: max_eta


@torch.no_grad()
def group_normalised(rewards: Tensor, valid: Tensor, epsilon: float = 1e-6) -> Tensor:
    """A_i = (r_i − mean r) / (std r + ε) within the group; GRPO, arXiv 2402.03300, section 4.1.2. [Q, G]."""
    centred = group_centred(rewards, valid)
    std = group_mean(centred.square(), valid).sqrt()[:, None]
    return centred / (std + epsilon)


@torch.no_grad()
def group_centred(rewards: Tensor, valid: Tensor) -> Tensor:
    """A_i = r_i − mean r within the group; Dr. GRPO, arXiv 2503.20783, section 3.1. [Q, G]."""
    return torch.where(valid, rewards - group_mean(rewards, valid)[:, None], 0.0)
