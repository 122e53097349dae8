"""ε_q, the radius of a query's trust region, in nats per response. Shape letters: Q queries, G rollouts."""

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
    """ε_q = base · (mean length, if per token) · (1 + s_q)^a · max(1, 2 h_q)^b · (ESS_q/G, if asked). float64 [Q].

    Drift since sampling uses the region up even where nothing more is to be learnt from a query, and it adds
    up with the steps taken since; the exponent gives old samples the room for it. The effective sample size
    takes room away where few of the samples still speak for π_θ.

    Args:
        staleness_exponent: a. headroom_exponent: b; 0 for the same room whatever the rewards.
        rewards: [Q, G]. lengths: [Q, G], response tokens.
        staleness: [Q], s_q, mean over the query's response tokens, steps.
        sequence_log_ratio: [Q, G], log π_θ(y_i) − log β(y_i). valid: bool [Q, G].
    """
    budget = base_nats * (1 + staleness.double()) ** staleness_exponent
    budget = budget * (2 * headroom(rewards, valid)).clamp(min=1) ** headroom_exponent
    if unit == "token":
        budget = budget * group_mean(lengths.double(), valid)
    if shrink_by_ess:
        # a common factor of the weights cancels, so the largest can be taken out before exp
        top = torch.where(valid, sequence_log_ratio.double(), -torch.inf).amax(1, keepdim=True)
        budget = budget * effective_sample_share((sequence_log_ratio.double() - top).exp(), valid)
    return budget


def headroom(rewards: Tensor, valid: Tensor) -> Tensor:
    """h_q = (max r − mean r)/(max r − min r) over the group, in [0, 1): the failure rate, for binary rewards. [Q].

    0 where all rewards are equal: such a group prefers nothing.
    """
    rewards = rewards.double()
    best = torch.where(valid, rewards, -torch.inf).amax(1)
    worst = torch.where(valid, rewards, torch.inf).amin(1)
    missing = (best - group_mean(rewards, valid)) / (best - worst)
    return torch.where(best > worst, missing, 0.0)
