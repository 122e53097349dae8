"""Packing: nothing lost, equal counts on every rank, rows within the limit."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quatro_ray.replay.packing import pack
from quatro_ray.replay.staleness import Lineage, Stretch
from quatro_ray.types import VersionSpan
from tests.make import group, pack_all, rollout

LINE = Lineage.unbroken(6)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 20), min_size=1, max_size=5), min_size=1, max_size=6),
    st.integers(1, 4),
    st.integers(22, 60),
)
def test_every_token_once_and_equal_counts(lengths: list[list[int]], ranks: int, limit: int) -> None:
    groups = [group(q, *(rollout(n, version=q) for n in ns)) for q, ns in enumerate(lengths)]
    total = sum(map(len, lengths))
    if total < ranks:
        with pytest.raises(ValueError, match="cannot be split"):
            pack(groups, LINE, num_ranks=ranks, rank=0, tokens_per_micro_batch=limit)
        return
    batches = pack_all(groups, LINE, num_ranks=ranks, tokens_per_micro_batch=limit)
    assert len({len(batch.micro_batches) for batch in batches}) == 1
    micro = [m for batch in batches for m in batch.micro_batches]
    assert all(len(m.token_ids) <= limit for m in micro)
    for batch in batches:
        assert batch.num_response_tokens.sum() == sum(map(sum, lengths)) and batch.valid.sum() == total
        tokens = [(m.rollout_index[m.is_response], m.staleness[m.is_response]) for m in micro]
        np.testing.assert_array_equal(batch.rollout_index, np.concatenate([index for index, _ in tokens]))
        np.testing.assert_array_equal(batch.staleness, np.concatenate([age for _, age in tokens]))
        assert batch.cells == batches[0].cells
    assert [row for of_rank in batch.cells for row in of_rank] == [
        tuple(dict.fromkeys(m.rollout_index[m.rollout_index >= 0].tolist())) for m in micro
    ]
    size = max(map(len, lengths))
    for q, ns in enumerate(lengths):
        for i, n in enumerate(ns):
            cells = [m.rollout_index == q * size + i for m in micro]
            assert sum(int((c & m.is_response).sum()) for c, m in zip(cells, micro, strict=True)) == n
            assert sum(bool(c.any()) for c in cells) == 1  # a rollout is never split


def test_targets_positions_and_versions_by_hand() -> None:
    batch = pack([group(0, rollout(3, version=4, newer_from=2))], LINE, num_ranks=1, rank=0, tokens_per_micro_batch=10)
    (m,) = batch.micro_batches
    assert m.token_ids.tolist() == [1, 2, 5, 6]
    assert m.position_ids.tolist() == [0, 1, 2, 3]
    assert m.is_response.tolist() == [False, True, True, True]
    assert m.target_ids.tolist() == [0, 5, 6, 7]
    assert m.behavior_logprobs.tolist() == [0, -1, -2, -3]
    assert m.staleness.tolist() == [0, 2, 2, 1]
    assert batch.rewards.tolist() == [[1.0]]


def test_what_the_environment_put_in_is_context_and_not_trained_on() -> None:
    sampled = np.array([True, False, False, True])
    made = replace(rollout(4, version=2), sampled=sampled)
    batch = pack([group(0, made)], LINE, num_ranks=1, rank=0, tokens_per_micro_batch=10)
    (m,) = batch.micro_batches
    assert m.token_ids.tolist() == [1, 2, 5, 6, 7]
    assert m.is_response.tolist() == [False, True, False, False, True]
    assert m.target_ids.tolist() == [0, 5, 0, 0, 8]
    assert m.staleness.tolist() == [0, 4, 0, 0, 4]
    assert batch.num_response_tokens.tolist() == [[2]]


def test_ragged_groups_are_masked() -> None:
    batch = pack(
        [group(0, rollout(), rollout()), group(1, rollout(reward=0.5))],
        LINE,
        num_ranks=1,
        rank=0,
        tokens_per_micro_batch=99,
    )
    assert batch.valid.tolist() == [[True, True], [True, False]]
    assert batch.rewards.tolist() == [[1.0, 1.0], [0.5, 0.0]]


def test_a_rollout_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="exceeds tokens_per_micro_batch=4"):
        pack([group(0, rollout(9))], LINE, num_ranks=1, rank=0, tokens_per_micro_batch=4)


def test_the_plan_depends_on_the_groups_alone() -> None:
    groups = [group(q, rollout(q + 1), rollout(2 * q + 1)) for q in range(5)]
    a, b = (pack(groups, LINE, num_ranks=2, rank=0, tokens_per_micro_batch=16) for _ in range(2))
    for ma, mb in zip(a.micro_batches, b.micro_batches, strict=True):
        np.testing.assert_array_equal(ma.token_ids, mb.token_ids)


def test_age_is_counted_in_steps_where_the_learner_fell_back() -> None:
    """Versions 5 and 6 were abandoned; 7 has the weights of 4, and 8 is a step from it."""
    line = Lineage((Stretch(0, 4, 0), Stretch(7, 8, 4)))
    made = replace(
        rollout(4), spans=(VersionSpan(3, 0, 1), VersionSpan(4, 1, 2), VersionSpan(7, 2, 3), VersionSpan(8, 3, 4))
    )
    (m,) = pack([group(0, made)], line, num_ranks=1, rank=0, tokens_per_micro_batch=10).micro_batches
    assert m.staleness[m.is_response].tolist() == [2, 1, 1, 0]


def test_padded_rows_fit_with_their_padding_and_have_no_padding_of_their_own() -> None:
    lengths = [3, 30, 4, 9, 17, 2, 2, 25]
    groups = [group(i, rollout(n), rollout(n)) for i, n in enumerate(lengths)]
    batches = pack_all(groups, Lineage.unbroken(0), num_ranks=2, tokens_per_micro_batch=64, row_layout="padded")
    assert len({len(batch.micro_batches) for batch in batches}) == 1
    seen: list[int] = []
    for micro in (m for batch in batches for m in batch.micro_batches):
        starts = [*np.flatnonzero(micro.position_ids == 0), len(micro.position_ids)]
        rows = np.diff(starts)
        assert len(rows) * rows.max() <= 64
        assert (micro.rollout_index >= 0).all()
        seen += np.unique(micro.rollout_index).tolist()
    assert sorted(seen) == list(range(2 * len(lengths)))


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_minibatches_take_whole_groups_and_as_many_rows_on_every_rank(num_ranks: int) -> None:
    groups = [group(q, rollout(3 + q), rollout(4), rollout(2 * q + 1)) for q in range(5)]
    batches = pack_all(groups, LINE, num_ranks=num_ranks, tokens_per_micro_batch=24, num_minibatches=2)
    assert len(batches[0].rows_per_minibatch) == 2
    seen = []
    for chosen in batches[0].minibatches():
        parts = [batch.micro_batches[chosen] for batch in batches]
        assert len({len(part) for part in parts}) == 1
        cells = {int(c) for part in parts for micro in part for c in micro.rollout_index if c >= 0}
        assert set(np.flatnonzero(batches[0].of_rows(chosen)).tolist()) == cells
        seen.append(cells)
    assert seen == [set(range(9)), set(range(9, 15))]


def test_a_minibatch_needs_a_rollout_for_every_rank() -> None:
    groups = [group(q, rollout(3)) for q in range(3)]
    with pytest.raises(ValueError, match="1 rollouts of a minibatch cannot be split over 2 ranks"):
        pack(groups, LINE, num_ranks=2, rank=0, tokens_per_micro_batch=24, num_minibatches=2)


def test_rows_get_an_even_width_if_the_limit_allows() -> None:
    groups = [group(0, rollout(9), rollout(30), rollout(5))]
    widths = {
        (limit, multiple): {
            len(m.token_ids)
            for m in pack(
                groups, LINE, num_ranks=1, rank=0, tokens_per_micro_batch=limit, width_multiple=multiple
            ).micro_batches
        }
        for limit, multiple in [(64, 1), (64, 32), (60, 32)]
    }
    assert widths == {(64, 1): {47}, (64, 32): {64}, (60, 32): {60}}


def test_padding_has_no_position_that_rollouts_do_not_have() -> None:
    """A learned embedding of positions may have no more of them than the longest rollout needs."""
    (m,) = pack(
        [group(0, rollout(9))], LINE, num_ranks=1, rank=0, tokens_per_micro_batch=64, width_multiple=32
    ).micro_batches
    assert m.position_ids.tolist() == [*range(10), *range(10), *range(10), 0, 1]
    assert m.rollout_index.tolist() == [0] * 10 + [-1] * 22 and not m.is_response[10:].any()
