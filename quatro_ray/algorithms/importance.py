"""Importance weights, and functions that bound them. Shape letters: N tokens of packed rollouts, B rollouts."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Level = Literal["token", "sequence", "geometric"]


def sequence_sums(values: Tensor, rollout_index: Tensor, num_rollouts: int) -> Tensor:
    """Sum a per-token value over each rollout, [N] → [B]: log π(y) = Σ_t log π(y_t | y_<t), the chain rule.

    Args:
        values: [N].
        rollout_index: int64 [N], row of the result; −1 (padding) counts nowhere.
        num_rollouts: B.
    """
    out = torch.zeros(num_rollouts + 1, dtype=values.dtype, device=values.device)
    # padding lands in the extra last row
    out = out.index_add(0, torch.where(rollout_index < 0, num_rollouts, rollout_index), values)
    return out[:-1]


def leveled(level: Level, log_ratio: Tensor, is_response: Tensor, rollout_index: Tensor, num_rollouts: int) -> Tensor:
    """Return the log-ratio at a level for every token, [N], nats; differentiable, 0 in padding.

    Levels: token is the token's own ratio; sequence is the product over its response, which is unbiased and of high
    variance (Precup et al. 2000, importance sampling per trajectory and per decision); geometric is the
    length-normalised root of that product (GSPO, arXiv 2507.18071, eq. 7).

    Args:
        level: one of the three above.
        log_ratio: [N], nats, 0 outside responses.
        is_response: bool [N].
        rollout_index: int64 [N], −1 for padding.
        num_rollouts: B.
    """
    if level == "token":
        return log_ratio
    totals = sequence_sums(log_ratio, rollout_index, num_rollouts)
    if level == "geometric":
        lengths = sequence_sums(is_response.to(log_ratio.dtype), rollout_index, num_rollouts)
        totals = totals / lengths.clamp(min=1)
    return torch.where(rollout_index < 0, 0.0, totals[rollout_index.clamp(min=0)])


@torch.no_grad()
def truncated(log_ratio: Tensor, upper: float) -> tuple[Tensor, Tensor]:
    """Return min(ρ, upper) and where it was cut; any shape. IMPALA, arXiv 1802.01561, section 4.1.

    Args:
        log_ratio: log ρ, nats.
        upper: bound on ρ itself, not on log ρ.
    """
    # the clamp of the exponent keeps exp finite and changes no result: `upper` is far below e⁵⁰
    ratio = log_ratio.clamp(max=50).exp()
    return ratio.clamp(max=upper), ratio > upper


@torch.no_grad()
def masked(log_ratio: Tensor, lower: float, upper: float) -> tuple[Tensor, Tensor]:
    """Return ρ where lower ≤ ρ ≤ upper and 0 elsewhere, and where it was masked; any shape.

    Source: the double-sided mask of IcePop and MIS (Liu et al. 2025, "When speed kills stability").

    Args:
        log_ratio: log ρ, nats.
        lower: smallest ρ (not log ρ) that is kept.
        upper: largest ρ that is kept.
    """
    ratio = log_ratio.clamp(max=50).exp()
    outside = (ratio < lower) | (ratio > upper)
    return torch.where(outside, 0.0, ratio), outside


@torch.no_grad()
def effective_sample_share(weights: Tensor, valid: Tensor) -> Tensor:
    """Return (Σw)²/(n Σw²) in (0, 1], the effective sample size as a share of n (Kish 1965).

    Args:
        weights: [..., n], ≥ 0.
        valid: bool [..., n]; n counts the valid entries only.
    """
    w = weights * valid
    return w.sum(-1).square() / (valid.sum(-1) * w.square().sum(-1)).clamp_min(torch.finfo(w.dtype).tiny)


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
