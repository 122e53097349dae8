"""Packs groups into micro-batches: whole rollouts in rows, with the same number of rows on every rank.

Every rank plans the rows of all, and makes its own: for 8 million tokens and 8 ranks, what a row holds is 370 MB.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quatro_ray.replay.staleness import Lineage
from quatro_ray.types import LearnerBatch, MicroBatch, Rollout, RolloutGroup, RowLayout


def pack(
    groups: Sequence[RolloutGroup],
    lineage: Lineage,
    *,
    num_ranks: int,
    rank: int,
    tokens_per_micro_batch: int,
    row_layout: RowLayout = "packed",
    num_minibatches: int = 1,
    width_multiple: int = 1,
) -> LearnerBatch:
    """Return the batch of one rank. Which rollouts a row gets depends on the groups alone, so all ranks agree.

    Rollouts go, longest first, to the row with the fewest tokens among `num_ranks · m` rows, with the smallest m for
    which all rows fit. All ranks get the same number of rows, because ZeRO-3 deadlocks otherwise.

    Args:
        groups: the Q groups of the step, each of at most G scored rollouts.
        lineage: lineage of the version that the step trains from.
        num_ranks: number of learner ranks.
        rank: the rank whose micro-batches are made; ranks that share rows count as one.
        tokens_per_micro_batch: largest number of tokens in a row, padding of the layout "padded" included.
        row_layout: "packed" gives all rows the width N of the longest one. With "padded" each row has its own width,
            because the model gets one sequence a row and would pad the padding again.
        num_minibatches: number of optimiser steps that share the batch; each takes whole groups. A version is so many
            optimiser steps, which is how staleness is counted.
        width_multiple: the width of packed rows is rounded up to a multiple of it, if the limit allows, because kernels
            on GPUs are fastest at few and even shapes.

    Raises:
        ValueError: a rollout is longer than tokens_per_micro_batch, or a minibatch has fewer rollouts than ranks.
    """
    shape = (len(groups), max(len(group.rollouts) for group in groups))
    members = {q * shape[1] + i: _Member(g, r) for q, g in enumerate(groups) for i, r in enumerate(g.rollouts)}
    num_row_tokens = _table(shape, {cell: member.num_row_tokens for cell, member in members.items()})
    longest = int(num_row_tokens.max())
    if longest > tokens_per_micro_batch:
        raise ValueError(f"a rollout of {longest} tokens exceeds tokens_per_micro_batch={tokens_per_micro_batch}")
    valid = _table(shape, dict.fromkeys(members, True), np.bool_)
    cells, rows_per_minibatch = _plan(
        num_row_tokens, valid, num_ranks, tokens_per_micro_batch, row_layout, num_minibatches
    )
    width = 1
    if row_layout == "packed":
        fullest = max(int(num_row_tokens.flat[list(row)].sum()) for of_rank in cells for row in of_rank)
        width = max(fullest, min(tokens_per_micro_batch, -(-fullest // width_multiple) * width_multiple))
    ages = {
        cell: num_minibatches * members[cell].staleness(lineage) for of_rank in cells for row in of_rank for cell in row
    }
    rewards = np.concatenate([group.rewards() for group in groups])
    own = [[(cell, members[cell], ages[cell]) for cell in row] for row in cells[rank]]
    return LearnerBatch(
        micro_batches=tuple(_micro_batch(row, width, longest) for row in own),
        cells=cells,
        rewards=_table(shape, dict(zip(members, rewards.tolist(), strict=True)), np.float64),
        valid=valid,
        num_row_tokens=num_row_tokens,
        num_response_tokens=_table(shape, {cell: len(age) for cell, age in ages.items()}),
        rollout_index=np.repeat(list(ages), [len(age) for age in ages.values()]),
        staleness=np.concatenate(list(ages.values())),
        rows_per_minibatch=rows_per_minibatch,
    )


@dataclass(frozen=True)
class _Member:
    """A rollout of the batch, with its group."""

    group: RolloutGroup
    rollout: Rollout

    @property
    def num_row_tokens(self) -> int:
        return len(self.group.prompt_token_ids) + self.rollout.num_tokens - 1

    def staleness(self, lineage: Lineage) -> NDArray[np.int64]:
        """Return the versions that each sampled token is old."""
        spans, sampled = self.rollout.spans, self.rollout.sampled
        of_spans = lineage.staleness(np.array([span.version for span in spans]))
        of_tokens = np.repeat(of_spans, [span.end - span.start for span in spans])
        return of_tokens if sampled is None else of_tokens[sampled]


def _table(shape: tuple[int, int], values: Mapping[int, float], dtype: type = np.int64) -> np.ndarray:
    """Return [Q, G] with the values of cells, and 0 where there is none."""
    table: np.ndarray = np.zeros(shape, dtype)
    table.flat[list(values)] = list(values.values())
    return table


def _plan(
    num_row_tokens: NDArray[np.int64],
    valid: NDArray[np.bool_],
    num_ranks: int,
    limit: int,
    row_layout: RowLayout,
    num_minibatches: int,
) -> tuple[tuple[tuple[tuple[int, ...], ...], ...], tuple[int, ...]]:
    """Return the cells of each row of every rank, and how many rows of a rank belong to each minibatch."""
    lengths = num_row_tokens.flatten()
    by_rank: list[list[tuple[int, ...]]] = [[] for _ in range(num_ranks)]
    rows_per_minibatch = []
    for chosen in np.array_split(np.arange(len(num_row_tokens)), num_minibatches):
        members = np.flatnonzero(valid & np.isin(np.arange(len(valid)), chosen)[:, None])
        if len(members) < num_ranks:
            raise ValueError(f"{len(members)} rollouts of a minibatch cannot be split over {num_ranks} ranks")
        rows = _assign(lengths[members], num_ranks, limit, row_layout)
        rows_per_minibatch.append(len(rows) // num_ranks)
        for k, of_rank in enumerate(by_rank):
            share = rows[k * rows_per_minibatch[-1] : (k + 1) * rows_per_minibatch[-1]]
            of_rank += [tuple(members[row].tolist()) for row in share]
    return tuple(map(tuple, by_rank)), tuple(rows_per_minibatch)


def _assign(lengths: np.ndarray, num_ranks: int, limit: int, row_layout: RowLayout) -> list[list[int]]:
    num_micro = max(1, -(-int(lengths.sum()) // (num_ranks * limit)))
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    while True:
        num_rows = min(num_ranks * num_micro, len(lengths) // num_ranks * num_ranks)
        rows: list[list[int]] = [[] for _ in range(num_rows)]
        emptiest = [(0, row) for row in range(num_rows)]
        for i in order:
            filled, row = emptiest[0]
            rows[row].append(i)
            # the first is the longest
            more = lengths[i] if row_layout == "packed" else lengths[rows[row][0]]
            heapq.heapreplace(emptiest, (filled + int(more), row))
        if max(emptiest)[0] <= limit:
            return [sorted(row) for row in rows]
        if num_rows < num_ranks * num_micro:
            return _one_per_row(len(lengths), num_ranks)
        num_micro += 1


def _one_per_row(count: int, num_ranks: int) -> list[list[int]]:
    """Return one rollout per row, then empty rows up to a multiple of `num_ranks`; these cost a pass and no more."""
    rows = [[i] for i in range(count)]
    return rows + [[] for _ in range(-count % num_ranks)]


def _micro_batch(row: Sequence[tuple[int, _Member, NDArray[np.int64]]], width: int, longest: int) -> MicroBatch:
    """Return one row, of cells, their rollouts, and the ages of their sampled tokens.

    Inputs are prompt and response without the last token; targets are the same, one token later.
    """
    ids, positions, targets, response, index, logprobs, staleness = ([] for _ in range(7))
    for cell, member, ages in row:
        prompt, rollout = member.group.prompt_token_ids, member.rollout
        tokens = np.concatenate([prompt, rollout.token_ids]).astype(np.int64)
        is_response = np.concatenate([np.zeros(len(prompt) - 1, dtype=bool), rollout.is_sampled()])
        age = np.zeros_like(tokens[1:])
        age[is_response] = ages
        ids.append(tokens[:-1])
        positions.append(np.arange(len(tokens) - 1))
        response.append(is_response)
        targets.append(np.where(is_response, tokens[1:], 0))
        index.append(np.full(len(tokens) - 1, cell))
        logprobs.append(np.concatenate([np.zeros(len(prompt) - 1), rollout.behavior_logprobs]))
        staleness.append(age)
    pad = max(0, width - sum(len(x) for x in ids))
    padding = np.arange(pad) % longest  # sequences of their own, at no position that rollouts do not have
    return MicroBatch(
        token_ids=_join(ids, pad, 0, np.int64),
        position_ids=_join([*positions, padding], 0, 0, np.int64),
        target_ids=_join(targets, pad, 0, np.int64),
        is_response=_join(response, pad, False, np.bool_),
        rollout_index=_join(index, pad, -1, np.int64),
        behavior_logprobs=_join(logprobs, pad, 0, np.float32),
        staleness=_join(staleness, pad, 0, np.int64),
    )


def _join(parts: Sequence[np.ndarray], pad: int, fill: float, dtype: type) -> np.ndarray:
    return np.concatenate([*parts, np.full(pad, fill)], dtype=dtype, casting="unsafe")
