"""Truncated importance weights. Shape letters: N tokens of packed rollouts, B rollouts."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor


def sequence_sums(values: Tensor, rollout_index: Tensor, num_rollouts: int) -> Tensor:
    """[N] → [B]: sum of a per-token value over each rollout; index −1 (padding) counts nowhere."""
    out = torch.zeros(num_rollouts + 1, dtype=values.dtype, device=values.device)
    # padding lands in the extra last row
    out.index_add_(0, torch.where(rollout_index < 0, num_rollouts, rollout_index), values)
    return out[:-1]


@torch.no_grad()
def weights(
    level: Literal["token", "sequence", "geometric"],
    truncation: float,
    log_ratio: Tensor,
    is_response: Tensor,
    rollout_index: Tensor,
    num_rollouts: int,
) -> Tensor:
    """w_t = min(ρ, truncation) for every token, detached.

    Args:
        level: ρ_t of the token itself; Π ρ_t over its response (exact, high variance); or that
            product's length-normalised root (GSPO, arXiv 2507.18071, eq. 7).
        log_ratio: [N], log π_θ − log β, 0 outside responses; is_response: bool [N].
        rollout_index: int64 [N], −1 for padding.
    """
    if level == "token":
        return log_ratio.exp().clamp(max=truncation)
    totals = sequence_sums(log_ratio, rollout_index, num_rollouts)
    if level == "geometric":
        lengths = sequence_sums(is_response.to(log_ratio.dtype), rollout_index, num_rollouts)
        totals = totals / lengths.clamp(min=1)
    return totals.exp().clamp(max=truncation)[rollout_index.clamp(min=0)]


@torch.no_grad()
def effective_sample_share(sequence_weights: Tensor) -> Tensor:
    """(Σw)²/(B Σw²) in (0, 1]: the share of the B rollouts that the weights leave in effect."""
    return sequence_weights.sum().square() / (len(sequence_weights) * sequence_weights.square().sum())
