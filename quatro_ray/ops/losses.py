"""One short function a method: per-token losses, not normalised (aggregation.py does that).

Shape: everything is [N], tokens of packed rollouts. The value of a policy-gradient loss is no measure of
progress; only its gradient means something.
"""

from __future__ import annotations

import torch
from torch import Tensor


def quatro(policy_logprobs: Tensor, advantage: Tensor, importance_weight: Tensor) -> Tensor:
    """−w_t A_i log π_θ(y_t), A_i and w_t detached (QUATRO, arXiv 2602.04620; docs/algorithm.md).

    Args:
        policy_logprobs: carries the gradient. advantage: the residual of the token's rollout.
        importance_weight: truncated π_θ/β.
    """
    return -(importance_weight * advantage).detach() * policy_logprobs


def grpo(
    policy_logprobs: Tensor, behavior_logprobs: Tensor, advantage: Tensor, *, clip_low: float, clip_high: float
) -> Tensor:
    """−min(ρ_t A_i, clip(ρ_t, 1 − clip_low, 1 + clip_high) A_i) with ρ_t = π_θ/β; GRPO, arXiv 2402.03300, eq. 3."""
    ratio = (policy_logprobs - behavior_logprobs).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip_low, 1 + clip_high) * advantage)


def reference_kl(policy_logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """The estimator e^d − d − 1 of KL(π_θ ‖ π_ref), d = log π_ref − log π_θ; GRPO, arXiv 2402.03300, eq. 4."""
    d = reference_logprobs - policy_logprobs
    return d.exp() - d - 1
