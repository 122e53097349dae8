"""Per-token losses, one short function per method; algorithms/aggregation.py normalises them.

Every tensor argument is [N], the tokens of packed rollouts, and so is the result. Log-probs and log-ratios are in
nats. Only `policy_logprobs` (π_θ), and a log-ratio made from it, carries a gradient. `advantage` is that of the
token's rollout. The value of a policy-gradient loss does not measure progress; only its gradient has a meaning.

Shape letters: N tokens of packed rollouts, M response tokens of the global batch.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from quatro_ray.algorithms import importance

Divergence = Literal["tv", "kl"]


class TokenLoss(NamedTuple):
    """A loss per token.

    Attributes:
        loss: [N], with gradient.
        limited: bool [N], tokens on which a clip, a truncation or a mask acted.
    """

    loss: Tensor
    limited: Tensor


def quatro(
    policy_logprobs: Tensor,
    behavior_logprobs: Tensor,
    advantage: Tensor,
    log_weight: Tensor,
    *,
    max_shift: float,
    truncation: float,
) -> TokenLoss:
    """Return −M_t sg[w_t] A_i log π_θ(y_t), w_t = min(ρ_t, truncation), ρ_t = π_θ/β.

    The mask M_t is 0 for a token that would be pushed further from β (A > 0 with ρ > 1, or A < 0 with ρ < 1) and whose
    probability has moved by more than `max_shift` already.

    Source: the targets A_i are those of QUATRO, arXiv 2602.04620; the mask is that of DPPO, arXiv 2602.04879, eq. 12
    and 13 (docs/algorithm.md).

    Args:
        policy_logprobs: [N], log π_θ(y_t), nats, with gradient.
        behavior_logprobs: [N], log β(y_t), nats, recorded when the token was sampled.
        advantage: [N], centred target of the token's rollout, nats (algorithms/advantages.py).
        log_weight: [N], log π_θ/β in nats, at the configured level (algorithms/importance.py:leveled).
        max_shift: δ, largest |π_θ − β| at which a token is pushed outward, a probability.
        truncation: upper bound of w_t.
    """
    weight, cut = importance.truncated(log_weight.detach(), truncation)
    dropped = _outward_beyond(policy_logprobs.detach(), behavior_logprobs, advantage, "tv", max_shift)
    return TokenLoss(torch.where(dropped, 0.0, -weight * advantage * policy_logprobs), dropped | cut)


def _outward_beyond(
    policy_logprobs: Tensor,
    behavior_logprobs: Tensor,
    advantage: Tensor,
    divergence: Divergence,
    threshold: float,
) -> Tensor:
    """Tell which tokens have moved from β by more than the threshold and would be pushed further, bool [N]."""
    outward = (policy_logprobs - behavior_logprobs) * advantage > 0
    return outward & (binary_divergence(policy_logprobs, behavior_logprobs, divergence) > threshold)


def clipped(
    log_ratio: Tensor, advantage: Tensor, *, clip_low: float, clip_high: float, dual_clip: float | None = None
) -> TokenLoss:
    """Return −min(ρ A, clip(ρ, 1 − clip_low, 1 + clip_high) A), ρ = exp(log_ratio); PPO, arXiv 1707.06347, eq. 7.

    With ρ_t = π_θ/β it is the loss of GRPO (arXiv 2402.03300, eq. 3), of Dr. GRPO (arXiv 2503.20783, section 3.1),
    which has another advantage and normalisation, and of DAPO (arXiv 2503.14476, eq. 8), which has
    clip_high > clip_low.

    Args:
        log_ratio: [N], log ρ, nats, with gradient.
        advantage: [N], that of the token's rollout.
        clip_low: distance of the lower end of the clip range from 1.
        clip_high: distance of the upper end from 1.
        dual_clip: see `dual_clipped`; none of these papers has it.
    """
    ratio = log_ratio.clamp(max=50).exp()
    bounded = ratio.clamp(1 - clip_low, 1 + clip_high)
    surrogate, bound = ratio * advantage, bounded * advantage
    return dual_clipped(TokenLoss(-torch.minimum(surrogate, bound), bound < surrogate), advantage, dual_clip)


def dual_clipped(token: TokenLoss, advantage: Tensor, dual_clip: float | None) -> TokenLoss:
    """Return min(loss, −dual_clip·A) for tokens with A < 0; dual-clip PPO, arXiv 1912.09729, eq. 5.

    A clip from below leaves a token with A < 0 and a large ratio unbounded, so that one of them can own the gradient.

    Args:
        token: a loss that contains −ρ A.
        advantage: [N], that of the token's rollout.
        dual_clip: ratio, above 1, beyond which such a token has no gradient. None changes nothing.
    """
    if dual_clip is None:
        return token
    bound = -dual_clip * advantage
    beyond = (advantage < 0) & (token.loss > bound)
    return TokenLoss(torch.where(beyond, bound, token.loss), token.limited | beyond)


def gspo(
    policy_logprobs: Tensor, sequence_log_ratio: Tensor, advantage: Tensor, *, clip_low: float, clip_high: float
) -> TokenLoss:
    """Return −min(s_i A_i, clip(s_i) A_i), s_i = (π_θ(y_i)/β(y_i))^(1/|y_i|); GSPO, arXiv 2507.18071, eq. 5 and 7.

    This is the paper's token form (eq. 15), s_it = sg[s_i] π_θ,t/sg[π_θ,t]: it has the same value as s_i and, in a
    mean over the response, the same gradient.

    Args:
        policy_logprobs: [N], log π_θ(y_t), nats, with gradient.
        sequence_log_ratio: [N], log s_i in nats, of the token's rollout.
        advantage: [N], that of the token's rollout.
        clip_low: distance of the lower end of the range of s_i from 1.
        clip_high: distance of the upper end from 1.
    """
    token_ratio = policy_logprobs - policy_logprobs.detach()
    return clipped(sequence_log_ratio.detach() + token_ratio, advantage, clip_low=clip_low, clip_high=clip_high)


def cispo(policy_logprobs: Tensor, behavior_logprobs: Tensor, advantage: Tensor, *, upper: float) -> TokenLoss:
    """Return −sg[min(ρ_t, upper)] A_i log π_θ(y_t), ρ_t = π_θ/β; CISPO, arXiv 2506.13585, eq. 4 and 5.

    As in the paper's experiments, ρ_t has no lower bound.
    """
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
    dual_clip: float | None = None,
) -> TokenLoss:
    """Return −(π_prox/β) min(u A, clip(u) A), u = π_θ/π_prox; AReaL, arXiv 2505.24298, eq. 5.

    As in AReaL, a token with π_prox/β > weight_cap has loss 0.
    """
    weight, outside = importance.masked(proximal_logprobs - behavior_logprobs, 0.0, weight_cap)
    inner = clipped(
        policy_logprobs - proximal_logprobs, advantage, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip
    )
    return TokenLoss(weight * inner.loss, inner.limited | outside)


def interpolated_proximal(behavior_logprobs: Tensor, policy_logprobs: Tensor, staleness: Tensor) -> Tensor:
    """Return log π_prox = α log β + (1 − α) log π_θ, detached, α = 1/staleness; A-3PO, arXiv 2512.06547.

    On policy (staleness 0) α is 0.

    Args:
        behavior_logprobs: [N], log β(y_t), nats, recorded when the token was sampled.
        policy_logprobs: [N], log π_θ(y_t), nats; no gradient flows back to it.
        staleness: int64 [N], optimiser steps.
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
    dual_clip: float | None = None,
) -> TokenLoss:
    """Return min(π_prox/β, truncation) times GRPO's loss around π_prox: truncated importance sampling (TIS).

    Source: Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training".

    Args:
        policy_logprobs: [N], log π_θ(y_t), nats, with gradient.
        proximal_logprobs: [N], log π_prox(y_t), nats, without gradient.
        log_weight: [N], log π_prox/β in nats, at the configured level (algorithms/importance.py:leveled).
        advantage: [N], that of the token's rollout.
        clip_low: distance of the lower end of the range of π_θ/π_prox from 1.
        clip_high: distance of the upper end from 1.
        truncation: upper bound of the weight.
        dual_clip: see `dual_clipped`.
    """
    weight, cut = importance.truncated(log_weight.detach(), truncation)
    inner = clipped(
        policy_logprobs - proximal_logprobs, advantage, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip
    )
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
    dual_clip: float | None = None,
) -> TokenLoss:
    """Return π_prox/β, masked to 0 outside [mask_low, mask_high], times GRPO's loss around π_prox.

    Source: masked importance sampling (MIS), Liu et al. 2025, "When speed kills stability"; at token level it is the
    double-sided mask of IcePop.

    Args:
        policy_logprobs: [N], log π_θ(y_t), nats, with gradient.
        proximal_logprobs: [N], log π_prox(y_t), nats, without gradient.
        log_weight: [N], log π_prox/β in nats, at the configured level (algorithms/importance.py:leveled).
        advantage: [N], that of the token's rollout.
        clip_low: distance of the lower end of the range of π_θ/π_prox from 1.
        clip_high: distance of the upper end from 1.
        mask_low: smallest weight that is kept, below 1.
        mask_high: largest weight that is kept, above 1.
        dual_clip: see `dual_clipped`.
    """
    weight, outside = importance.masked(log_weight.detach(), mask_low, mask_high)
    inner = clipped(
        policy_logprobs - proximal_logprobs, advantage, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip
    )
    return TokenLoss(weight * inner.loss, inner.limited | outside)


def m2po(
    policy_logprobs: Tensor,
    behavior_logprobs: Tensor,
    advantage: Tensor,
    *,
    log_ratio_threshold: float,
    dual_clip: float | None = None,
) -> TokenLoss:
    """Return −M_t ρ_t A_i, ρ_t = π_θ/β; M2PO, arXiv 2510.01161, section 4.

    The mask M_t is 0 for a token that pushes further outward (A > 0 with ρ > 1, or A < 0 with ρ < 1) if |log ρ_t|
    exceeds the threshold.

    Args:
        policy_logprobs: [N], log π_θ(y_t), nats, with gradient.
        behavior_logprobs: [N], log β(y_t), nats, recorded when the token was sampled.
        advantage: [N], that of the token's rollout.
        log_ratio_threshold: result of `m2_threshold` for the global batch, nats.
        dual_clip: see `dual_clipped`; the paper has none.
    """
    log_ratio = policy_logprobs - behavior_logprobs
    outward = log_ratio.detach() * advantage > 0
    dropped = outward & (log_ratio.detach().abs() > log_ratio_threshold)
    loss = torch.where(dropped, 0.0, -log_ratio.clamp(max=50).exp() * advantage)
    return dual_clipped(TokenLoss(loss, dropped), advantage, dual_clip)


@torch.no_grad()
def m2_threshold(log_ratio: Tensor, advantage: Tensor, tau: float) -> float:
    """Return the largest |log ρ| that M2PO keeps; arXiv 2510.01161, section 4 and algorithm 1.

    Outward tokens (log ρ and A of the same sign) are dropped, largest first, until the mean of (log ρ)² over the
    remaining ones is at most τ.

    Args:
        log_ratio: [M], log π_k/β of the response tokens of the global batch, nats.
        advantage: [M], that of the token's rollout.
        tau: bound on the second moment, nats².

    Returns:
        nats; ∞ if no token need be dropped, 0 if all outward tokens are.
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
    """Return −(4/τ) σ(τ(ρ_t − 1)) A_i, a soft gate in place of a clip; SAPO, arXiv 2511.20347, eq. 5 and 6.

    Args:
        policy_logprobs: [N], log π_θ(y_t), nats, with gradient.
        behavior_logprobs: [N], log β(y_t), nats, recorded when the token was sampled.
        advantage: [N], that of the token's rollout.
        tau_positive: τ of tokens with A_i > 0.
        tau_negative: τ of all other tokens.
    """
    tau = torch.where(advantage > 0, tau_positive, tau_negative).to(policy_logprobs.dtype)
    ratio = (policy_logprobs - behavior_logprobs).clamp(max=50).exp()
    gate = torch.sigmoid(tau * (ratio - 1)) * 4 / tau
    return TokenLoss(-gate * advantage, torch.zeros_like(ratio, dtype=torch.bool))


def dppo(
    policy_logprobs: Tensor,
    behavior_logprobs: Tensor,
    advantage: Tensor,
    *,
    divergence: Divergence,
    threshold: float,
    upper: float,
) -> TokenLoss:
    """Return −M_t sg[min(ρ_t, upper)] A_i log π_θ(y_t), ρ_t = π_θ/β; DPPO, arXiv 2602.04879, eq. 12 and 23.

    The mask M_t is 0 for a token that pushes further outward (A > 0 with ρ > 1, or A < 0 with ρ < 1) if its binary
    divergence exceeds the threshold. The value differs from that of eq. 12; eq. 23 is the gradient.

    Args:
        policy_logprobs: [N], log π_θ(y_t), nats, with gradient.
        behavior_logprobs: [N], log β(y_t), nats, recorded when the token was sampled.
        advantage: [N], that of the token's rollout.
        divergence: see `binary_divergence`.
        threshold: δ, largest divergence of an outward token that is kept: a probability for tv, nats for kl.
        upper: C, upper bound of ρ; ∞ for none.
    """
    policy = policy_logprobs.detach()
    weight, cut = importance.truncated(policy - behavior_logprobs, upper)
    dropped = _outward_beyond(policy, behavior_logprobs, advantage, divergence, threshold)
    return TokenLoss(torch.where(dropped, 0.0, -weight * advantage * policy_logprobs), dropped | cut)


@torch.no_grad()
def binary_divergence(policy_logprobs: Tensor, behavior_logprobs: Tensor, divergence: Divergence) -> Tensor:
    """Return the divergence between β and π_θ, the sampled token against the rest, [N]; arXiv 2602.04879, section 4.4.

    tv: |β − π_θ| (eq. 13). kl: KL(β ‖ π_θ) of the two Bernoulli distributions, nats (eq. 14). Neither exceeds the
    divergence over the whole vocabulary.

    Args:
        policy_logprobs: [N], log π_θ(y_t), nats.
        behavior_logprobs: [N], log β(y_t), nats.
        divergence: one of the two above.
    """
    if divergence == "tv":
        return (behavior_logprobs.exp() - policy_logprobs.exp()).abs()
    # a log-prob that was rounded to 0 would leave the other tokens nothing, and the result would be infinite
    policy, behavior = policy_logprobs.clamp(max=-1e-8), behavior_logprobs.clamp(max=-1e-8)
    policy_rest, behavior_rest = -policy.expm1(), -behavior.expm1()
    return behavior.exp() * (behavior - policy) + behavior_rest * (behavior_rest / policy_rest).log()


def drpo(
    policy_logprobs: Tensor, behavior_logprobs: Tensor, advantage: Tensor, *, threshold: float, upper: float
) -> TokenLoss:
    """Return −sg[min(ρ_t, upper) g_t] A_i log π_θ(y_t), g_t = 1 − sign(A_i) (π_θ − β)/δ; DRPO, arXiv 2606.09821.

    Without the bound it has the gradient of ρ A − |A| β (ρ − 1)²/(2δ) (eq. 8), a quadratic regulariser on the shift
    π_θ − β, although not its value. g_t falls as the shift grows outward, is 0 where the shift is δ, and pulls the
    token back beyond that. It lies in [1 − 1/δ, 1 + 1/δ]. The bound of ρ is ours. The equations are those of the
    authors' code and its README (github.com/Tencent-Hunyuan/UniRL); the paper itself was not at hand.

    Args:
        policy_logprobs: [N], log π_θ(y_t), nats, with gradient.
        behavior_logprobs: [N], log β(y_t), nats, recorded when the token was sampled.
        advantage: [N], that of the token's rollout.
        threshold: δ, a shift of probability.
        upper: upper bound of ρ; ∞ for none, as in that code.
    """
    policy = policy_logprobs.detach()
    weight, cut = importance.truncated(policy - behavior_logprobs, upper)
    gate = 1 - advantage.sign() * (policy.exp() - behavior_logprobs.exp()) / threshold
    return TokenLoss(-weight * gate * advantage * policy_logprobs, cut | (gate < 0))


def reinforce(policy_logprobs: Tensor, log_weight: Tensor, advantage: Tensor, *, truncation: float) -> TokenLoss:
    """Return −min(ρ, truncation) A_i log π_θ(y_t), with ρ = π_θ/β detached.

    Source: REINFORCE (Williams 1992) with the truncated importance weights of IMPALA (arXiv 1802.01561, section 4.1).

    Args:
        policy_logprobs: [N], log π_θ(y_t), nats, with gradient.
        log_weight: [N], log ρ in nats, at the configured level (algorithms/importance.py:leveled).
        advantage: [N], that of the token's rollout: its reward minus a baseline.
        truncation: upper bound of the weight.
    """
    weight, cut = importance.truncated(log_weight.detach(), truncation)
    return TokenLoss(-weight * advantage * policy_logprobs, cut)


def reference_kl(policy_logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """Estimate KL(π_θ ‖ π_ref) by e^d − d − 1, d = log π_ref − log π_θ, per token; GRPO, arXiv 2402.03300, eq. 4."""
    d = reference_logprobs - policy_logprobs
    return d.exp() - d - 1
