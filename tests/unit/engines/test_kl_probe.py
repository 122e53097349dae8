"""The probe of step control on one rank, with a policy that is a table of log-probs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from quatro_ray.engines.batches import MicroBatchTensors
from quatro_ray.engines.kl_probe import Probe
from quatro_ray.engines.sequence_parallel import Ranks
from quatro_ray.replay.packing import pack
from quatro_ray.replay.staleness import Lineage
from quatro_ray.types import LearnerBatch, Rollout, RolloutGroup, RowLayout, Score, VersionSpan
from tests.make import group, pack_all

NUM_QUERIES, GROUP_SIZE = 6, 8


@pytest.fixture(autouse=True)
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def make_groups() -> list[RolloutGroup]:
    rng = np.random.default_rng(0)

    def one() -> Rollout:
        n = int(rng.integers(1, 12))
        tokens, logprobs = rng.integers(1, 9, n).astype(np.int32), np.full(n, -2.0, np.float32)
        return Rollout(tokens, logprobs, (VersionSpan(0, 0, n),), "", "stop", Score(1.0))

    return [group(q, *(one() for _ in range(GROUP_SIZE))) for q in range(NUM_QUERIES)]


class Policy:
    """Log-probs by position and token; notes the rows that it was asked for."""

    def __init__(self) -> None:
        self.table = torch.log_softmax(torch.randn(20, 10, generator=torch.Generator().manual_seed(0)), -1)
        self.rows: list[MicroBatchTensors] = []

    def __call__(self, row: MicroBatchTensors) -> Tensor:
        self.rows.append(row)
        return torch.where(row.is_response, self.table[row.position_ids, row.target_ids], 0.0)


def make_probe(batch: LearnerBatch, policy: Policy, rank: int = 0, share: float = 0.25, limit: int = 40) -> Probe:
    layout: RowLayout = "packed"
    return Probe(
        batch,
        slice(None),
        Ranks(rank, num_ranks=len(batch.cells)),
        share=share,
        limit=limit,
        layout=layout,
        device=torch.device("cpu"),
        logprobs=policy,
    )


def _all_from_outside(rollout: Rollout) -> Rollout:
    return replace(rollout, sampled=np.zeros(rollout.num_tokens, dtype=np.bool_))


def cells(rows: list[MicroBatchTensors]) -> set[int]:
    return {int(cell) for row in rows for cell in row.rollout_index[row.is_response]}


def test_it_scores_the_share_of_every_query_and_nothing_else() -> None:
    batch = pack(make_groups(), Lineage.unbroken(0), num_ranks=1, rank=0, tokens_per_micro_batch=100)
    policy = Policy()
    make_probe(batch, policy)
    assert cells(policy.rows) == {q * GROUP_SIZE + i for q in range(NUM_QUERIES) for i in (0, 1)}
    assert all(len(row.token_ids) <= 40 for row in policy.rows)
    assert all((row.rollout_index >= 0).all() for row in policy.rows)


def test_the_same_rows_are_scored_before_and_after() -> None:
    batch = pack(make_groups(), Lineage.unbroken(0), num_ranks=1, rank=0, tokens_per_micro_batch=100)
    policy = Policy()
    probe = make_probe(batch, policy)
    before, policy.rows = policy.rows, []
    still = probe.measure(torch.zeros(NUM_QUERIES, dtype=torch.float64))
    assert [id(row) for row in policy.rows] == [id(row) for row in before]
    assert still.kl_nats.tolist() == [0.0] * NUM_QUERIES
    policy.table = torch.log_softmax(policy.table * 1.3, -1)
    assert (probe.measure(torch.zeros(NUM_QUERIES, dtype=torch.float64)).kl_nats > 0).all()


def test_every_rank_takes_part_in_the_same_number_of_passes() -> None:
    """The rollouts that are probed may all lie on one rank; the others score a token that counts nothing."""
    batches = pack_all(make_groups(), Lineage.unbroken(0), num_ranks=3, tokens_per_micro_batch=30)
    policies = [Policy() for _ in range(3)]
    for rank, (batch, policy) in enumerate(zip(batches, policies, strict=True)):
        make_probe(batch, policy, rank, limit=16)
    assert len({len(policy.rows) for policy in policies}) == 1
    counted = [cells(policy.rows) for policy in policies]
    assert sum(map(len, counted)) == len(set.union(*counted)) == 2 * NUM_QUERIES


def test_a_rank_without_a_probed_rollout_takes_part_too() -> None:
    """One query of which one rollout is probed, on three ranks."""
    batches = pack_all(make_groups()[:1], Lineage.unbroken(0), num_ranks=3, tokens_per_micro_batch=30)
    policies = [Policy() for _ in range(3)]
    for rank, (batch, policy) in enumerate(zip(batches, policies, strict=True)):
        make_probe(batch, policy, rank, share=0.1)
    assert [len(policy.rows) for policy in policies] == [1, 1, 1]
    assert sorted(map(len, (cells(policy.rows) for policy in policies))) == [0, 0, 1]


def test_rollouts_without_a_sampled_token_are_passed_over() -> None:
    groups = [replace(g, rollouts=(_all_from_outside(g.rollouts[0]), *g.rollouts[1:])) for g in make_groups()]
    batch = pack(groups, Lineage.unbroken(0), num_ranks=1, rank=0, tokens_per_micro_batch=100)
    policy = Policy()
    make_probe(batch, policy)
    assert cells(policy.rows) == {q * GROUP_SIZE + i for q in range(NUM_QUERIES) for i in (1, 2)}
