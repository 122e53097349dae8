"""Advantages: one number per rollout, computed from the rewards of its group.

They are computed for the global batch before any gradient, because a method needs whole groups and a micro-batch may
hold part of one; losses only look them up. Shape letters: Q queries, G rollouts of a query.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quatro_ray.algorithms import trust_region

_ROUNDING = 1e-9
"""Difference of rewards, relative to the largest of a group, that counts as none."""
_MAX_GAP_NATS = 20.0
"""Cap on η in units of 1/(max r − min r): the largest gap between two targets of a group. It binds only if the best
rewards of a group are nearly equal, where the solution would go to infinity."""


@dataclass(frozen=True)
class QuatroAdvantages:
    """Result of `quatro`.

    Attributes:
        advantage: float64 [Q, G], nats; 0 where invalid.
        stabilizer: float64 [Q], in [0, 1], weight of −p_t log ρ_t in the advantage of a token.
        solution: the trust region's solution, from which the targets were taken.
    """

    advantage: Tensor
    stabilizer: Tensor
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
    rewards: Tensor, valid: Tensor, *, tilt_budget_nats: Tensor, drift_nats: Tensor, drift_radius_nats: Tensor
) -> QuatroAdvantages:
    """Return the centred targets t_i − mean t of QUATRO (arXiv 2602.04620), and the weights of its stabiliser.

    The advantage of a token is t_i − mean t − c_q p_t log ρ_t (losses.quatro): what the group says, less what the
    policy has moved already. The targets t_i of a group sum to less than zero, which would push against everything
    sampled; centring removes that. The weight c_q = min(1, drift/radius) grows as the policy moves away from its
    samples. At 1, the advantage of a token with p_t = 1 is the residual of the exact solution, which vanishes at π*.

    Args:
        rewards: [Q, G].
        valid: bool [Q, G].
        tilt_budget_nats: [Q], ε_q, the KL of the targets, nats per response; any value where all rewards are equal.
        drift_nats: [Q], KL(β ‖ π_θ) since sampling, nats per response.
        drift_radius_nats: [Q], > 0, drift at which the stabiliser has its full weight, nats per response.
    """
    rewards = without_rounding(rewards, valid)
    span = torch.where(valid, rewards, -torch.inf).amax(1) - torch.where(valid, rewards, torch.inf).amin(1)
    differs = span > 0
    cap = torch.where(differs, _MAX_GAP_NATS / span, 1.0)
    solution = trust_region.solve(rewards, valid, torch.where(differs, tilt_budget_nats, 1.0), cap)
    target = solution.target_log_ratio
    centred = torch.where(valid, target - group_mean(target, valid)[:, None], 0.0)
    return QuatroAdvantages(centred, (drift_nats / drift_radius_nats).clamp(max=1), solution)


@torch.no_grad()
def without_rounding(rewards: Tensor, valid: Tensor) -> Tensor:
    """Return the rewards, but equal ones where a group's differ by no more than rounding, float64 [Q, G].

    QUATRO's targets do not depend on the scale of rewards: 0.1 + 0.2 would be preferred to 0.3 as 1 is to 0.

    Args:
        rewards: [Q, G].
        valid: bool [Q, G].
    """
    rewards = rewards.double()
    best = torch.where(valid, rewards, -torch.inf).amax(1, keepdim=True)
    tolerance = _ROUNDING * torch.where(valid, rewards, 0.0).abs().amax(1, keepdim=True)
    return torch.where(best - rewards <= tolerance, best, rewards)


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
