"""The only normalisation: from per-token losses to one number, over the global batch."""

from __future__ import annotations

from typing import Literal

from torch import Tensor


def aggregate(
    per_token: Tensor,
    is_response: Tensor,
    mode: Literal["token_mean", "sequence_mean"],
    *,
    num_tokens: int,
    num_rollouts: int,
) -> Tensor:
    """This micro-batch's share of the global loss; shares add up over micro-batches and ranks.

    Args:
        per_token: [N]; is_response: bool [N].
        mode: token_mean: Σ/num_tokens. sequence_mean: Σ/num_rollouts.
        num_tokens, num_rollouts: of the global batch, so that no split changes the result.
    """
    return (per_token * is_response).sum() / (num_tokens if mode == "token_mean" else num_rollouts)
