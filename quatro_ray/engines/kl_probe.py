"""KL(π_k ‖ π_k+1) on a part of the step's batch, with few passes without gradient and one all-reduce.

Shape letters: N tokens of a packed row, Q queries, G rollouts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from quatro_ray.algorithms.importance import sequence_sums
from quatro_ray.algorithms.step_control import ProbeKl, rollout_kl

Row = dict[str, Tensor]
"""The tensors of a types.MicroBatch by name, and `start_logprobs`: log π_k of the targets, 0 outside responses."""


class Probe:
    """Some rollouts of every query: a part that held whole queries could miss all those that still change."""

    def __init__(
        self, micro_batches: Sequence[Row], start_logprobs: Sequence[Tensor], share: float, valid: Tensor
    ) -> None:
        """start_logprobs: [N] for each micro-batch; valid: bool [Q, G].

        Every rank has the same number of micro-batches, and so takes part in the same number of passes.
        """
        self._shape = valid.shape
        per_query = max(1, round(share * self._shape[1]))
        rows = [t | {"start_logprobs": s} for t, s in zip(micro_batches, start_logprobs, strict=True)]
        chosen = [_only(row, per_query, self._shape[1]) for row in rows]
        size = math.ceil(len(rows) / math.ceil(share * len(rows)))
        self._rows = [_joined(chosen[i : i + size]) for i in range(0, len(rows), size)]

    def measure(self, logprobs: Callable[[Row], Tensor], query_staleness: Tensor) -> ProbeKl:
        """logprobs: row → [N], of the targets, 0 outside responses. query_staleness: float64 [Q]. A collective."""
        num_cells = self._shape.numel()
        totals = torch.zeros(2, num_cells, dtype=torch.float64, device=query_staleness.device)
        for row in self._rows:
            index = row["rollout_index"]
            start, behavior, response = row["start_logprobs"], row["behavior_logprobs"], row["is_response"]
            totals[0] += rollout_kl(logprobs(row), start, behavior, response, index, num_cells)
            totals[1] += sequence_sums(response.double(), index, num_cells)
        dist.all_reduce(totals)
        kl, tokens = totals.view(2, *self._shape).sum(2)
        probed = tokens > 0
        return ProbeKl(kl[probed] / tokens[probed], query_staleness[probed])


def _only(row: Row, per_query: int, group_size: int) -> Row:
    """The first `per_query` rollouts of each query, or the row's first sequence where it has none of them."""
    index = row["rollout_index"]
    kept = (index >= 0) & (index % group_size < per_query)
    if not kept.any():
        kept = (row["position_ids"] == 0).cumsum(0) == 1
    return {name: value[kept] for name, value in row.items()}


def _joined(rows: Sequence[Row]) -> Row:
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
