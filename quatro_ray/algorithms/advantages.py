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
        solution: the trust region's solution, from which the targets were taken.
    """

    advantage: Tensor
    solution: trust_region.Solution


def group_mean(values: Tensor, valid: Tensor) -> Tensor:
    """Return the mean over each group's valid entries, [Q, G] → [Q]: the group baseline of GRPO (arXiv 2402.03300)."""
    return (values * valid).sum(1) / valid.sum(1)


@torch.no_grad()
def quatro(rewards: Tensor, valid: Tensor, *, tilt_share: float) -> QuatroAdvantages:
    """Return the centred targets t_i − mean t of QUATRO, t_i = log π*(y_i)/β(y_i); arXiv 2602.04620.

    The targets t_i of a group sum to less than zero, which would push against everything sampled. Centring removes
    that.

    Args:
        rewards: [Q, G].
        valid: bool [Q, G].
        tilt_share: κ, see `tilt_budget`, which is the KL of the targets.
    """
    rewards = without_rounding(rewards, valid)
    span = torch.where(valid, rewards, -torch.inf).amax(1) - torch.where(valid, rewards, torch.inf).amin(1)
    differs = span > 0
    cap = torch.where(differs, _MAX_GAP_NATS / span, 1.0)
    budget = torch.where(differs, tilt_budget(rewards, valid, tilt_share), 1.0)
    solution = trust_region.solve(rewards, valid, budget, cap)
    target = solution.target_log_ratio
    centred = torch.where(valid, target - group_mean(target, valid)[:, None], 0.0)
    return QuatroAdvantages(centred, solution)


@torch.no_grad()
def tilt_budget(rewards: Tensor, valid: Tensor, share: float) -> Tensor:
    """Return ε_q = share · log(G/k), k being the number of rollouts that have the best reward of their group.

    log(G/k) is the largest KL(w ‖ uniform) that any η reaches: all weight is on the best rollouts. So every group whose
    rewards differ has an η at which the budget is met exactly, at any length of the responses.

    Source: quatro_ray, docs/algorithm.md.

    Args:
        rewards: [Q, G].
        valid: bool [Q, G].
        share: κ, in (0, 1).

    Returns:
        float64 [Q], nats per response; 0 if all rewards of a group are equal.
    """
    rewards = without_rounding(rewards, valid)
    best = torch.where(valid, rewards, -torch.inf).amax(1, keepdim=True)
    is_best = (rewards == best) & valid
    return -share * group_mean(is_best.double(), valid).log()


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
