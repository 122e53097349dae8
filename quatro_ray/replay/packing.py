"""Packs groups into micro-batches: whole rollouts in rows, with the same number of rows on every rank."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from quatro_ray.replay.staleness import Lineage
from quatro_ray.types import LearnerBatch, MicroBatch, Rollout, RolloutGroup, RowLayout


def pack(
    groups: Sequence[RolloutGroup],
    lineage: Lineage,
    *,
    num_ranks: int,
    tokens_per_micro_batch: int,
    row_layout: RowLayout = "packed",
    num_minibatches: int = 1,
    width_multiple: int = 1,
) -> LearnerBatch:
    """Return the micro-batches of all ranks. The result depends on the arguments alone, so all ranks compute the same.

    Rollouts go, longest first, to the row with the fewest tokens among `num_ranks · m` rows, with the smallest m for
    which all rows fit. All ranks get the same number of rows, because ZeRO-3 deadlocks otherwise.

    Args:
        groups: the Q groups of the step, each of at most G scored rollouts.
        lineage: lineage of the version that the step trains from.
        num_ranks: number of learner ranks.
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
    flat = [(g, r) for g in groups for r in g.rollouts]
    lengths = np.array([len(g.prompt_token_ids) + r.num_tokens - 1 for g, r in flat])
    if lengths.max() > tokens_per_micro_batch:
        raise ValueError(f"a rollout of {lengths.max()} tokens exceeds tokens_per_micro_batch={tokens_per_micro_batch}")
    group_of = np.repeat(np.arange(len(groups)), [len(g.rollouts) for g in groups])
    by_rank: list[list[list[int]]] = [[] for _ in range(num_ranks)]
    rows_per_minibatch = []
    for chosen in np.array_split(np.arange(len(groups)), num_minibatches):
        members = np.flatnonzero(np.isin(group_of, chosen))
        if len(members) < num_ranks:
            raise ValueError(f"{len(members)} rollouts of a minibatch cannot be split over {num_ranks} ranks")
        assigned = _assign(lengths[members], num_ranks, tokens_per_micro_batch, row_layout)
        rows_per_minibatch.append(len(assigned) // num_ranks)
        for k in range(num_ranks):
            of_rank = assigned[k * rows_per_minibatch[-1] : (k + 1) * rows_per_minibatch[-1]]
            by_rank[k] += [members[row].tolist() for row in of_rank]
    rows = [row for of_rank in by_rank for row in of_rank]
    width = 1
    if row_layout == "packed":
        fullest = max(int(lengths[row].sum()) for row in rows)
        width = max(fullest, min(tokens_per_micro_batch, -(-fullest // width_multiple) * width_multiple))
    # flat index → cell of [Q, G]
    size = max(len(g.rollouts) for g in groups)
    cells = [q * size + i for q, g in enumerate(groups) for i in range(len(g.rollouts))]
    longest = int(lengths.max())
    micro = [
        _micro_batch([(cells[i], *flat[i]) for i in row], width, longest, lineage, num_minibatches) for row in rows
    ]
    per_rank = len(rows) // num_ranks
    rewards = np.zeros((len(groups), size))
    valid = np.zeros((len(groups), size), dtype=bool)
    for q, group in enumerate(groups):
        rewards[q, : len(group.rollouts)] = group.rewards()
        valid[q, : len(group.rollouts)] = True
    return LearnerBatch(
        micro_batches=tuple(tuple(micro[k * per_rank : (k + 1) * per_rank]) for k in range(num_ranks)),
        rewards=rewards,
        valid=valid,
        num_tokens=sum(int(r.is_sampled().sum()) for _, r in flat),
        num_rollouts=len(flat),
        rows_per_minibatch=tuple(rows_per_minibatch),
    )


def _assign(lengths: np.ndarray, num_ranks: int, limit: int, row_layout: RowLayout) -> list[list[int]]:
    num_micro = max(1, -(-int(lengths.sum()) // (num_ranks * limit)))
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    while True:
        num_rows = min(num_ranks * num_micro, len(lengths) // num_ranks * num_ranks)
        rows: list[list[int]] = [[] for _ in range(num_rows)]
        filled = np.zeros(num_rows, dtype=np.int64)
        for i in order:
            row = int(filled.argmin())
            rows[row].append(i)
            # the first is the longest
            filled[row] = lengths[rows[row]].sum() if row_layout == "packed" else len(rows[row]) * lengths[rows[row][0]]
        if filled.max() <= limit:
            return [sorted(row) for row in rows]
        if num_rows < num_ranks * num_micro:
            return _one_per_row(len(lengths), num_ranks)
        num_micro += 1


def _one_per_row(count: int, num_ranks: int) -> list[list[int]]:
    """Return one rollout per row, then empty rows up to a multiple of `num_ranks`; these cost a pass and no more."""
    rows = [[i] for i in range(count)]
    return rows + [[] for _ in range(-count % num_ranks)]


def _micro_batch(
    members: Sequence[tuple[int, RolloutGroup, Rollout]],
    width: int,
    longest: int,
    lineage: Lineage,
    steps_per_version: int,
) -> MicroBatch:
    """Return one row. Inputs are prompt and response without the last token; targets are the same, one token later."""
    ids, positions, targets, response, index, logprobs, staleness = ([] for _ in range(7))
    for cell, group, rollout in members:
        tokens = np.concatenate([group.prompt_token_ids, rollout.token_ids]).astype(np.int64)
        n, p = len(tokens) - 1, len(group.prompt_token_ids)
        is_response = np.concatenate([np.zeros(p - 1, dtype=bool), rollout.is_sampled()])
        ids.append(tokens[:-1])
        positions.append(np.arange(n))
        response.append(is_response)
        targets.append(np.where(is_response, tokens[1:], 0))
        index.append(np.full(n, cell))
        logprobs.append(np.concatenate([np.zeros(p - 1), rollout.behavior_logprobs]))
        age = np.where(rollout.is_sampled(), steps_per_version * lineage.staleness(rollout.versions()), 0)
        staleness.append(np.concatenate([np.zeros(p - 1), age]))
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
    joined: np.ndarray = np.concatenate([*parts, np.full(pad, fill)]).astype(dtype)
    return joined
