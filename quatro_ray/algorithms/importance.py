"""Importance weights, and what bounds them. Shape letters: N tokens of packed rollouts, B rollouts."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Level = Literal["token", "sequence", "geometric"]


def sequence_sums(values: Tensor, rollout_index: Tensor, num_rollouts: int) -> Tensor:
    """[N] → [B]: sum of a per-token value over each rollout; index −1 (padding) counts nowhere."""
    out = torch.zeros(num_rollouts + 1, dtype=values.dtype, device=values.device)
    # padding lands in the extra last row
    out = out.index_add(0, torch.where(rollout_index < 0, num_rollouts, rollout_index), values)
    return out[:-1]


def leveled(level: Level, log_ratio: Tensor, is_response: Tensor, rollout_index: Tensor, num_rollouts: int) -> Tensor:
    """[N]: for every token the log-ratio at a level; differentiable, 0 in padding.

    Args:
        level: token: its own. sequence: the sum over its response (exact, high variance). geometric: the
            mean over its response, the length-normalised root of GSPO (arXiv 2507.18071, eq. 7).
        log_ratio: [N], 0 outside responses; is_response: bool [N]; rollout_index: int64 [N], −1 for padding.
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
    """min(ρ, upper), and where it was cut; any shape."""
    # the bound on the exponent keeps exp finite; `upper` is far below
    ratio = log_ratio.clamp(max=50).exp()
    return ratio.clamp(max=upper), ratio > upper


@torch.no_grad()
def masked(log_ratio: Tensor, lower: float, upper: float) -> tuple[Tensor, Tensor]:
    """ρ where lower ≤ ρ ≤ upper, else 0, and where it was masked; any shape."""
    ratio = log_ratio.clamp(max=50).exp()
    outside = (ratio < lower) | (ratio > upper)
    return torch.where(outside, 0.0, ratio), outside


@torch.no_grad()
def effective_sample_share(weights: Tensor, valid: Tensor) -> Tensor:
    """(Σw)²/(n Σw²) in (0, 1] over the last dimension: the share of the n valid samples left in effect."""
    w = weights * valid
    return w.sum(-1).square() / (valid.sum(-1) * w.square().sum(-1)).clamp_min(torch.finfo(w.dtype).tiny)
