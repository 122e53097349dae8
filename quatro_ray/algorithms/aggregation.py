"""The only normalisation: from per-token losses to one number, over the global batch.

Shape letters: N tokens of packed rollouts (whole ones), B rollouts of the global batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from quatro_ray.algorithms.importance import sequence_sums

AggregationMode = Literal["token_mean", "seq_mean_token_sum", "seq_mean_token_mean", "seq_mean_token_sum_norm"]


@dataclass(frozen=True)
class BatchSize:
    """Of the global batch, so that no split into micro-batches or ranks changes the loss.

    Attributes:
        num_tokens: response tokens; num_rollouts: B.
        num_cells: Q·G, rows that `rollout_index` may point to; max_response_tokens: the longest possible.
    """

    num_tokens: int
    num_rollouts: int
    num_cells: int
    max_response_tokens: int


def aggregate(
    per_token: Tensor, is_response: Tensor, rollout_index: Tensor, mode: AggregationMode, size: BatchSize
) -> Tensor:
    """This micro-batch's share of the global loss; shares add up over micro-batches and ranks.

    Args:
        per_token: [N]; is_response: bool [N]; rollout_index: int64 [N], −1 for padding.
        mode: token_mean: Σ/num_tokens (DAPO, arXiv 2503.14476, eq. 8). seq_mean_token_sum: Σ/B.
            seq_mean_token_mean: Σ_i (1/|y_i|) Σ_t /B (GRPO, arXiv 2402.03300, eq. 3).
            seq_mean_token_sum_norm: Σ/(B · max_response_tokens) (Dr. GRPO, arXiv 2503.20783, section 3.1).
    """
    values = per_token * is_response
    if mode == "token_mean":
        return values.sum() / size.num_tokens
    if mode == "seq_mean_token_mean":
        lengths = sequence_sums(is_response.to(values.dtype), rollout_index, size.num_cells)
        values = values / lengths.clamp(min=1)[rollout_index.clamp(min=0)]
    divisor = size.num_rollouts
    if mode == "seq_mean_token_sum_norm":
        divisor *= size.max_response_tokens
    return values.sum() / divisor
