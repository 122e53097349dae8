"""The two radii of a query: how far one group may tilt the policy, and how far the policy may drift from its samples.

They have different units. What a group of G samples can say is bounded by log G whatever the length of a response.
Drift adds up over tokens and over optimiser steps. Shape letters: Q queries, G rollouts of a query, M response tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quatro_ray.algorithms.advantages import group_mean, without_rounding


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
def drift_radius(nats_per_token: float, staleness_exponent: float, lengths: Tensor, staleness: Tensor) -> Tensor:
    """Return ε_0 · (mean length) · (1 + s_q)^a, the room for drift since sampling, float64 [Q], nats per response.

    The policy drifts with every token and every step after sampling, even if a query has nothing left to teach.

    Source: quatro_ray, docs/algorithm.md.

    Args:
        nats_per_token: ε_0.
        staleness_exponent: a.
        lengths: [Q], mean response tokens of the query's rollouts.
        staleness: [Q], s_q, mean over the query's response tokens, optimiser steps.
    """
    return nats_per_token * lengths.double() * (1 + staleness.double()) ** staleness_exponent


@torch.no_grad()
def token_drift(log_ratio: Tensor) -> Tensor:
    """Estimate KL(β ‖ π) of each token: ρ − 1 − log ρ, or ½ log² ρ if the token has become likelier; float64 [M].

    The two agree to second order. The second one grows slowly, so one token whose ratio is far off cannot decide what
    the drift of its query is.

    Source: the estimators k3 and k2 of Schulman 2020, "Approximating KL divergence" (joschu.net/blog/kl-approx.html).

    Args:
        log_ratio: [M], log ρ_t = log π(y_t)/β(y_t), nats.
    """
    x = log_ratio.double()
    return torch.where(x > 0, x.square() / 2, torch.expm1(x) - x)
