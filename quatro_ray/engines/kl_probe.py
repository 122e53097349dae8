"""KL(π_k ‖ π_k+1) measured on part of the step's batch, with few forward passes and one all-reduce.

The same rows are scored before the step and after it, because the kernels of a GPU depend on the shape of their input:
against log-probs from other rows, the KL of a step of length 0 would not be 0.

Shape letters: N tokens of a row, Q queries, G rollouts of a query.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quatro_ray.algorithms.importance import sequence_sums
from quatro_ray.algorithms.step_control import ProbeKl, rollout_kl
from quatro_ray.engines.batches import MicroBatchTensors
from quatro_ray.engines.sequence_parallel import Ranks
from quatro_ray.types import LearnerBatch, MicroBatch, RowLayout


class Probe:
    """Some rollouts of every query: whole queries, but fewer of them, could miss all those that still change.

    Every rank has the same number of rows, and so takes part in the same number of passes.

    Args:
        batch: the batch of the step.
        chosen: the rows, of every rank, that the step takes.
        ranks: this rank and the others.
        share: fraction of each query's rollouts to measure the KL on, in (0, 1].
        limit: largest number of tokens in a row, padding included.
        layout: how the model reads a row.
        device: where the rows are put.
        logprobs: maps a row to the log-probs of its targets under the present weights, float32 [N], nats, 0 outside
            responses; a collective. Called here for the log-probs before the step.
    """

    def __init__(
        self,
        batch: LearnerBatch,
        chosen: slice,
        ranks: Ranks,
        *,
        share: float,
        limit: int,
        layout: RowLayout,
        device: torch.device,
        logprobs: Callable[[MicroBatchTensors], Tensor],
    ) -> None:
        self._shape, self._ranks, self._logprobs, self._device = batch.valid.shape, ranks, logprobs, device
        sampled = batch.of_rows(chosen) & (batch.num_response_tokens > 0)
        probed = sampled & (sampled.cumsum(1) <= max(1, round(share * sampled.shape[1])))
        rows = _own_rows(batch, chosen, ranks.row_rank, probed.flatten(), limit, layout)
        self._rows = [MicroBatchTensors.copy_from(row, device) for row in rows]
        self._start = [logprobs(row) for row in self._rows]

    def measure(self, query_staleness: Tensor) -> ProbeKl:
        """Compare the present weights with those at the start of the step; a collective.

        Args:
            query_staleness: float64 [Q], optimiser steps.
        """
        num_cells = self._shape[0] * self._shape[1]
        totals = torch.zeros(2, num_cells, dtype=torch.float64, device=self._device)
        for row, start in zip(self._rows, self._start, strict=True):
            index, response = row.rollout_index, row.is_response
            totals[0] += rollout_kl(self._logprobs(row), start, row.behavior_logprobs, response, index, num_cells)
            totals[1] += sequence_sums(response.double(), index, num_cells)
        self._ranks.sum(totals)
        kl, tokens = totals.view(2, *self._shape).sum(2)
        probed = tokens > 0
        return ProbeKl(kl[probed] / tokens[probed], query_staleness[probed])


def _own_rows(
    batch: LearnerBatch,
    chosen: slice,
    row_rank: int,
    probed: NDArray[np.bool_],
    limit: int,
    layout: RowLayout,
) -> list[MicroBatch]:
    """Return this rank's rows of the probed rollouts, as many as every other rank has; probed: bool [Q·G]."""
    cells = [[cell for row in of_rank[chosen] for cell in row if probed[cell]] for of_rank in batch.cells]
    rows = [_rows(batch.num_row_tokens.flat[of_rank].tolist(), limit, layout) for of_rank in cells]
    own = batch.micro_batches[chosen]
    sequences = [sequence for sequence in _sequences(own) if probed[sequence.rollout_index[0]]]
    missing = max(map(len, rows)) - len(rows[row_rank])
    return [_joined(sequences[row]) for row in rows[row_rank]] + [_counting_nothing(own)] * missing


def _rows(lengths: Sequence[int], limit: int, layout: RowLayout) -> list[slice]:
    """Divide sequences of these lengths, in tokens, into rows that are as full as the limit allows."""
    if not lengths:
        return []
    starts = [0]
    for end, length in enumerate(lengths):
        row = [*lengths[starts[-1] : end], length]
        if (sum(row) if layout == "packed" else len(row) * max(row)) > limit:
            starts.append(end)
    return [slice(start, end) for start, end in zip(starts, [*starts[1:], len(lengths)], strict=True)]


def _sequences(micro_batches: tuple[MicroBatch, ...]) -> Iterator[MicroBatch]:
    """Yield each rollout of the rows, without the padding."""
    for micro in micro_batches:
        starts = np.flatnonzero(micro.position_ids == 0)
        for start, end in zip(starts, [*starts[1:], len(micro.position_ids)], strict=True):
            if micro.rollout_index[start] >= 0:
                yield MicroBatch(**{name: values[start:end] for name, values in vars(micro).items()})


def _joined(sequences: list[MicroBatch]) -> MicroBatch:
    columns: dict[str, NDArray] = {
        name: np.concatenate([getattr(s, name) for s in sequences]) for name in vars(sequences[0])
    }
    return MicroBatch(**columns)


def _counting_nothing(micro_batches: tuple[MicroBatch, ...]) -> MicroBatch:
    """Return a token that counts nowhere, for a rank that has fewer rows than another."""
    token = {name: values[:1].copy() for name, values in vars(micro_batches[0]).items()}
    token |= {"is_response": np.zeros(1, dtype=np.bool_), "rollout_index": np.full(1, -1)}
    return MicroBatch(**token)
