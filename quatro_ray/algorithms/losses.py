"""One short function a method: per-token losses, not normalised (aggregation.py does that).

Every argument is [N], tokens of packed rollouts, and so is the result. `policy_logprobs` (π_θ) alone carries
a gradient; `advantage` is that of the token's rollout. `limited` marks tokens that a clip, a cut or a mask acted
on. The value of a policy-gradient loss is no measure of progress; only its gradient means something.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from quatro_ray.algorithms import importance


class TokenLoss(NamedTuple):
    """`loss` [N] with gradient; `limited` bool [N]."""

    loss: Tensor
    limited: Tensor


def quatro(policy_logprobs: Tensor, advantage: Tensor, log_weight: Tensor, *, truncation: float) -> TokenLoss:
    """−w_t A_i log π_θ(y_t), w_t = min(π_θ/β, truncation) and A_i detached (QUATRO, arXiv 2602.04620).

    Args:
        advantage: the residual of the token's rollout (algorithms/advantages.py).
        log_weight: log π_θ/β at the level chosen (importance.leveled).
    """
    weight, cut = importance.truncated(log_weight.detach(), truncation)
    return TokenLoss(-weight * advantage * policy_logprobs, cut)


def clipped(log_ratio: Tensor, advantage: Tensor, *, clip_low: float, clip_high: float) -> TokenLoss:
    """−min(ρ A, clip(ρ, 1 − clip_low, 1 + clip_high) A), ρ = exp(log_ratio).

    GRPO (arXiv 2402.03300, eq. 3) with ρ_t = π_θ/β; Dr. GRPO (arXiv 2503.20783, section 3.1) with another
    advantage and normalisation; DAPO (arXiv 2503.14476, eq. 8) with clip_high > clip_low.
    """
    ratio = log_ratio.clamp(max=50).exp()
    bounded = ratio.clamp(1 - clip_low, 1 + clip_high)
    surrogate, bound = ratio * advantage, bounded * advantage
    return TokenLoss(-torch.minimum(surrogate, bound), bound < surrogate)


def gspo(
    policy_logprobs: Tensor, sequence_log_ratio: Tensor, advantage: Tensor, *, clip_low: float, clip_high: float
) -> TokenLoss:
    """−min(s_i A_i, clip(s_i) A_i), s_i = (π_θ(y_i)/β(y_i))^(1/|y_i|); GSPO, arXiv 2507.18071, eq. 5 and 7.

    In its token form (eq. 15 there): s_it = sg[s_i] π_θ,t/sg[π_θ,t], of the same value and, under a mean over
    the response, the same gradient.

    Args:
        sequence_log_ratio: log s_i of the token's rollout.
    """
    token_ratio = policy_logprobs - policy_logprobs.detach()
    return clipped(sequence_log_ratio.detach() + token_ratio, advantage, clip_low=clip_low, clip_high=clip_high)


def cispo(policy_logprobs: Tensor, behavior_logprobs: Tensor, advantage: Tensor, *, upper: float) -> TokenLoss:
    """−sg[min(ρ_t, upper)] A_i log π_θ(y_t); CISPO (MiniMax-M1, arXiv 2506.13585, eq. 4 and 5, no lower bound)."""
    weight, cut = importance.truncated(policy_logprobs.detach() - behavior_logprobs, upper)
    return TokenLoss(-weight * advantage * policy_logprobs, cut)


def decoupled_ppo(
    policy_logprobs: Tensor,
    proximal_logprobs: Tensor,
    behavior_logprobs: Tensor,
    advantage: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    weight_cap: float,
) -> TokenLoss:
    """−(π_prox/β) min(u A, clip(u) A), u = π_θ/π_prox; AReaL, arXiv 2505.24298, eq. 5.

    Tokens with π_prox/β > weight_cap are left out, as AReaL does.
    """
    weight, outside = importance.masked(proximal_logprobs - behavior_logprobs, 0.0, weight_cap)
    inner = clipped(policy_logprobs - proximal_logprobs, advantage, clip_low=clip_low, clip_high=clip_high)
    return TokenLoss(weight * inner.loss, inner.limited | outside)


def interpolated_proximal(behavior_logprobs: Tensor, policy_logprobs: Tensor, staleness: Tensor) -> Tensor:
    """α log β + (1 − α) log π_θ, detached, with α = 1/staleness, 0 on policy; A-3PO, arXiv 2512.06547.

    Args:
        staleness: integer [N], optimiser steps.
    """
    alpha = torch.where(staleness > 0, 1 / staleness.clamp(min=1), 0.0)
    return alpha * behavior_logprobs + (1 - alpha) * policy_logprobs.detach()


def tis_grpo(
    policy_logprobs: Tensor,
    proximal_logprobs: Tensor,
    log_weight: Tensor,
    advantage: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    truncation: float,
) -> TokenLoss:
    """min(π_prox/β, truncation) times GRPO's loss around π_prox: truncated importance sampling.

    Source: Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training", eq. of TIS.

    Args:
        log_weight: log π_prox/β at the level chosen (importance.leveled).
    """
    weight, cut = importance.truncated(log_weight.detach(), truncation)
    inner = clipped(policy_logprobs - proximal_logprobs, advantage, clip_low=clip_low, clip_high=clip_high)
    return TokenLoss(weight * inner.loss, inner.limited | cut)


def mis_grpo(
    policy_logprobs: Tensor,
    proximal_logprobs: Tensor,
    log_weight: Tensor,
    advantage: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    mask_low: float,
    mask_high: float,
) -> TokenLoss:
    """π_prox/β, or 0 outside of [mask_low, mask_high], times GRPO's loss around π_prox: masked importance sampling.

    Source: Liu et al. 2025, "When speed kills stability", MIS; at token level IcePop's double-sided mask.

    Args:
        log_weight: log π_prox/β at the level chosen (importance.leveled).
    """
    weight, outside = importance.masked(log_weight.detach(), mask_low, mask_high)
    inner = clipped(policy_logprobs - proximal_logprobs, advantage, clip_low=clip_low, clip_high=clip_high)
    return TokenLoss(weight * inner.loss, inner.limited | outside)


def m2po(
    policy_logprobs: Tensor, behavior_logprobs: Tensor, advantage: Tensor, *, log_ratio_threshold: float
) -> TokenLoss:
    """−M_t ρ_t A_i; M2PO, arXiv 2510.01161, section 4.

    M_t drops a token that pushes further out (A > 0 with ρ > 1, or A < 0 with ρ < 1) where |log ρ_t|
    exceeds the threshold that brings the second moment of the rest down to τ (`m2_threshold`).
    """
    log_ratio = policy_logprobs - behavior_logprobs
    outward = log_ratio.detach() * advantage > 0
    dropped = outward & (log_ratio.detach().abs() > log_ratio_threshold)
    return TokenLoss(torch.where(dropped, 0.0, -log_ratio.clamp(max=50).exp() * advantage), dropped)


@torch.no_grad()
def m2_threshold(log_ratio: Tensor, advantage: Tensor, tau: float) -> float:
    """The largest |log ρ| that may stay so that the mean of (log ρ)² over outward tokens is at most τ.

    M2PO, arXiv 2510.01161, section 4 and algorithm 1: the largest are dropped first. Over the global batch.
    """
    outward = log_ratio[log_ratio * advantage > 0].abs().double().sort().values
    if not len(outward):
        return float("inf")
    moments = outward.square().cumsum(0) / torch.arange(1, len(outward) + 1, device=outward.device)
    kept = int((moments <= tau).sum())  # running means of ascending values ascend
    return float("inf") if kept == len(outward) else float(outward[kept - 1]) if kept else 0.0


def sapo(
    policy_logprobs: Tensor, behavior_logprobs: Tensor, advantage: Tensor, *, tau_positive: float, tau_negative: float
) -> TokenLoss:
    """−(4/τ) σ(τ(ρ_t − 1)) A_i, τ by the sign of A_i: a gate for a clip; SAPO, arXiv 2511.20347, eq. 5 and 6."""
    tau = torch.where(advantage > 0, tau_positive, tau_negative).to(policy_logprobs.dtype)
    ratio = (policy_logprobs - behavior_logprobs).clamp(max=50).exp()
    gate = torch.sigmoid(tau * (ratio - 1)) * 4 / tau
    return TokenLoss(-gate * advantage, torch.zeros_like(ratio, dtype=torch.bool))


def reinforce(policy_logprobs: Tensor, log_weight: Tensor, advantage: Tensor, *, truncation: float) -> TokenLoss:
    """−min(ρ, truncation) A_i log π_θ(y_t), ρ detached: REINFORCE (Williams 1992) with truncated importance
    weights (IMPALA, arXiv 1802.01561, section 4.1).

    Args:
        log_weight: log π_θ/β at the level chosen (importance.leveled).
    """
    weight, cut = importance.truncated(log_weight.detach(), truncation)
    return TokenLoss(-weight * advantage * policy_logprobs, cut)


def reference_kl(policy_logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """[N]: the estimator e^d − d − 1 of KL(π_θ ‖ π_ref), d = log π_ref − log π_θ; GRPO, arXiv 2402.03300, eq. 4."""
    d = reference_logprobs - policy_logprobs
    return d.exp() - d - 1
