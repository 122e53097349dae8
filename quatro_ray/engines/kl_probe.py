"""KL(π_k ‖ π_k+1) measured on part of the step's batch, with few forward passes and one all-reduce.

Shape letters: N tokens of a packed row, Q queries, G rollouts of a query.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from quatro_ray.algorithms.importance import sequence_sums
from quatro_ray.algorithms.step_control import ProbeKl, rollout_kl
from quatro_ray.engines.batches import MicroBatchTensors


@dataclass(frozen=True)
class _Row:
    """Packed rollouts and `start_logprobs`: float32 [N], log π_k of the targets, nats, 0 outside responses."""

    micro: MicroBatchTensors
    start_logprobs: Tensor


class Probe:
    """Some rollouts of every query: whole queries, but fewer of them, could miss all those that still change.

    Every rank has the same number of micro-batches, and so takes part in the same number of passes.

    Args:
        micro_batches: those of this rank.
        start_logprobs: float32 [N] for each micro-batch: log π_k of the targets, nats, 0 outside responses.
        share: fraction of each query's rollouts to measure on, in (0, 1].
        valid: bool [Q, G].
    """

    def __init__(
        self, micro_batches: Sequence[MicroBatchTensors], start_logprobs: Sequence[Tensor], share: float, valid: Tensor
    ) -> None:
        self._shape = valid.shape
        per_query = max(1, round(share * self._shape[1]))
        rows = [_Row(micro, start) for micro, start in zip(micro_batches, start_logprobs, strict=True)]
        chosen = [_only(row, per_query, self._shape[1]) for row in rows]
        size = math.ceil(len(rows) / math.ceil(share * len(rows)))
        self._rows = [_joined(chosen[i : i + size]) for i in range(0, len(rows), size)]

    def measure(self, logprobs: Callable[[MicroBatchTensors], Tensor], query_staleness: Tensor) -> ProbeKl:
        """Compare the present weights with those at the start of the step; a collective.

        Args:
            logprobs: maps a row to log π_k+1 of its targets, float32 [N], nats, 0 outside responses.
            query_staleness: float64 [Q], optimiser steps.
        """
        num_cells = self._shape.numel()
        totals = torch.zeros(2, num_cells, dtype=torch.float64, device=query_staleness.device)
        for row in self._rows:
            micro = row.micro
            index, response = micro.rollout_index, micro.is_response
            totals[0] += rollout_kl(
                logprobs(micro), row.start_logprobs, micro.behavior_logprobs, response, index, num_cells
            )
            totals[1] += sequence_sums(response.double(), index, num_cells)
        dist.all_reduce(totals)
        kl, tokens = totals.view(2, *self._shape).sum(2)
        probed = tokens > 0
        return ProbeKl(kl[probed] / tokens[probed], query_staleness[probed])


def _only(row: _Row, per_query: int, group_size: int) -> _Row:
    """Return the first `per_query` rollouts of each query, or the row's first sequence if it has none of them."""
    index = row.micro.rollout_index
    kept = (index >= 0) & (index % group_size < per_query)
    if not kept.any():
        kept = (row.micro.position_ids == 0).cumsum(0) == 1
    return _Row(row.micro.select(kept), row.start_logprobs[kept])


def _joined(rows: Sequence[_Row]) -> _Row:
    joined = MicroBatchTensors.concatenate([row.micro for row in rows])
    return _Row(joined, torch.cat([row.start_logprobs for row in rows]))
