"""The only normalisation: reduces per-token losses to one number over the global batch.

Shape letters: N tokens of packed rollouts (each is whole), B rollouts and Q queries of the global batch, G rollouts of
a query.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from quatro_ray.algorithms.importance import sequence_sums

AggregationMode = Literal[
    "token_mean", "prompt_mean", "seq_mean_token_sum", "seq_mean_token_mean", "seq_mean_token_sum_norm"
]


@dataclass(frozen=True)
class BatchSize:
    """Size of what one optimiser step takes; dividing by it makes the loss independent of micro-batches and ranks.

    Attributes:
        tokens_per_query: [Q], response tokens of each query's rollouts; 0 for queries of other steps.
        num_queries: number of queries of the step.
        num_rollouts: B.
        num_cells: Q·G, the number of values that `rollout_index` may take.
        max_response_tokens: length of the longest possible response, in tokens.
    """

    tokens_per_query: Tensor
    num_queries: int
    num_rollouts: int
    num_cells: int
    max_response_tokens: int


def aggregate(
    per_token: Tensor, is_response: Tensor, rollout_index: Tensor, mode: AggregationMode, size: BatchSize
) -> Tensor:
    """Return this micro-batch's share of the global loss; shares add up over micro-batches and ranks.

    Modes, with Σ over response tokens: token_mean is Σ divided by all response tokens (DAPO, arXiv 2503.14476, eq. 8);
    prompt_mean divides by the response tokens of the query and by Q, so that queries weigh the same at any length
    (ScaleRL, arXiv 2510.13786); seq_mean_token_mean is (1/B) Σ_i (1/|y_i|) Σ_t (GRPO, arXiv 2402.03300, eq. 3);
    seq_mean_token_sum is Σ/B (REINFORCE, Williams 1992); seq_mean_token_sum_norm is Σ/(B · max_response_tokens)
    (Dr. GRPO, arXiv 2503.20783, section 3.1).

    Args:
        per_token: [N], losses.
        is_response: bool [N].
        rollout_index: int64 [N], −1 for padding.
        mode: one of the five above.
        size: that of what the optimiser step takes.
    """
    values = per_token * is_response
    if mode == "token_mean":
        return values.sum() / size.tokens_per_query.sum().to(values.dtype)
    if mode == "prompt_mean":
        query = rollout_index.clamp(min=0) // (size.num_cells // len(size.tokens_per_query))
        per_query = size.tokens_per_query.to(values.dtype).clamp(min=1)
        return (values / per_query[query]).sum() / size.num_queries
    if mode == "seq_mean_token_mean":
        lengths = sequence_sums(is_response.to(values.dtype), rollout_index, size.num_cells)
        values = values / lengths.clamp(min=1)[rollout_index.clamp(min=0)]
    divisor = size.num_rollouts
    if mode == "seq_mean_token_sum_norm":
        divisor *= size.max_response_tokens
    return values.sum() / divisor
