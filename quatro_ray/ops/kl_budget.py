"""ε_q, the radius of a query's trust region, in nats per response. Shape letters: Q queries, G rollouts."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from quatro_ray.ops.advantages import group_mean
from quatro_ray.ops.importance import effective_sample_share


@torch.no_grad()
def kl_budget(
    base_nats: float,
    *,
    unit: Literal["response", "token"],
    staleness_exponent: float,
    shrink_by_ess: bool,
    lengths: Tensor,
    staleness: Tensor,
    sequence_log_ratio: Tensor,
    valid: Tensor,
) -> Tensor:
    """ε_q = base · (mean length, if per token) · (1 + s_q)^exponent · (ESS_q/G, if asked). float64 [Q].

    Drift since sampling uses the region up even where nothing more is to be learnt from a query, and it adds
    up with the steps taken since; the exponent gives old samples the room for it. The effective sample size
    takes room away where few of the samples still speak for π_θ.

    Args:
        lengths: [Q, G], response tokens. staleness: [Q], s_q, mean over the query's response tokens, steps.
        sequence_log_ratio: [Q, G], log π_θ(y_i) − log β(y_i). valid: bool [Q, G].
    """
    budget = base_nats * (1 + staleness.double()) ** staleness_exponent
    if unit == "token":
        budget = budget * group_mean(lengths.double(), valid)
    if shrink_by_ess:
        # a common factor of the weights cancels, so the largest can be taken out before exp
        top = torch.where(valid, sequence_log_ratio.double(), -torch.inf).amax(1, keepdim=True)
        budget = budget * effective_sample_share((sequence_log_ratio.double() - top).exp(), valid)
    return budget
