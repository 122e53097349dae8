"""ε_q, the radius of a query's trust region, in nats per response.

Shape letters: Q queries, G rollouts of a query.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from quatro_ray.algorithms.advantages import group_mean
from quatro_ray.algorithms.importance import effective_sample_share


@torch.no_grad()
def kl_budget(
    base_nats: float,
    *,
    unit: Literal["response", "token"],
    staleness_exponent: float,
    shrink_by_ess: bool,
    headroom_exponent: float,
    rewards: Tensor,
    lengths: Tensor,
    staleness: Tensor,
    sequence_log_ratio: Tensor,
    valid: Tensor,
) -> Tensor:
    """Return ε_q = base · (mean length, if per token) · (1 + s_q)^a · max(1, 2 h_q)^b · (ESS_q/G, if asked).

    The policy drifts with every step after sampling, and drift uses up the region even if a query has nothing left
    to teach; the staleness factor gives old samples room for it. The effective sample size takes room away if few of
    the samples still represent π_θ.

    Source: quatro_ray, docs/algorithm.md; a = b = 0 without the ESS is the fixed ε of QUATRO (arXiv 2602.04620).

    Args:
        base_nats: nats per response, or per token if `unit` is "token".
        unit: "token" multiplies the budget by the mean length of the query's responses.
        staleness_exponent: a.
        shrink_by_ess: whether to multiply by ESS_q/G, the effective sample size as a share of the group.
        headroom_exponent: b; 0 ignores the rewards.
        rewards: [Q, G].
        lengths: [Q, G], response tokens.
        staleness: [Q], s_q, mean over the query's response tokens, optimiser steps.
        sequence_log_ratio: [Q, G], log π_θ(y_i) − log β(y_i), nats.
        valid: bool [Q, G].

    Returns:
        float64 [Q], nats per response.
    """
    budget = base_nats * (1 + staleness.double()) ** staleness_exponent
    budget = budget * (2 * headroom(rewards, valid)).clamp(min=1) ** headroom_exponent
    if unit == "token":
        budget = budget * group_mean(lengths.double(), valid)
    if shrink_by_ess:
        # a common factor of the weights cancels, so the largest is divided out before exp, which then cannot overflow
        top = torch.where(valid, sequence_log_ratio.double(), -torch.inf).amax(1, keepdim=True)
        budget = budget * effective_sample_share((sequence_log_ratio.double() - top).exp(), valid)
    return budget


def headroom(rewards: Tensor, valid: Tensor) -> Tensor:
    """Return h_q = (max r − mean r)/(max r − min r) of each group, [Q] in [0, 1): for binary rewards, the failure rate.

    It is 0 if all rewards of a group are equal, because such a group prefers nothing. Source: quatro_ray,
    docs/algorithm.md.

    Args:
        rewards: [Q, G].
        valid: bool [Q, G].
    """
    rewards = rewards.double()
    best = torch.where(valid, rewards, -torch.inf).amax(1)
    worst = torch.where(valid, rewards, torch.inf).amin(1)
    missing = (best - group_mean(rewards, valid)) / (best - worst)
    return torch.where(best > worst, missing, 0.0)
