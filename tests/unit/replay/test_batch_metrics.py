"""Figures of the groups that a step trains on, by hand, and of those that expired before it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from quatro_ray.config import ReplayConfig
from quatro_ray.replay.batch_metrics import batch_metrics
from quatro_ray.replay.buffer import ReplayBuffer
from quatro_ray.types import Query, Rollout, RolloutGroup, Score
from tests.make import group, rollout


def scored(tokens: int, *, truncated: bool = False, **parts: float) -> Rollout:
    """A response whose reward is the sum of its parts."""
    score = Score(sum(parts.values()), reward_values=parts)
    return replace(rollout(tokens), score=score, finish_reason="length" if truncated else "stop")


def of(source: str, made: RolloutGroup) -> RolloutGroup:
    return replace(made, query=replace(made.query, source=source))


def test_lengths_and_truncation() -> None:
    groups = [
        group(1, scored(3, answer=1.0), scored(40, answer=0.0, truncated=True), prompt_tokens=2),
        group(2, scored(41, answer=0.0, truncated=True), scored(15, answer=1.0), prompt_tokens=6),
    ]
    found = batch_metrics(groups)
    assert found["rollout/num"] == 4
    assert found["rollout/truncated_share"] == 0.5
    assert found["rollout/response_tokens_mean"] == pytest.approx(99 / 4)
    assert found["rollout/response_tokens_max"] == 41
    assert found["rollout/response_tokens_histogram"] == {3: 1, 15: 1, 40: 2}
    assert (found["rollout/prompt_tokens_mean"], found["rollout/prompt_tokens_max"]) == (4.0, 6)
    assert found["rollout/prompt_tokens_histogram"] == {2: 1, 6: 1}


def test_tokens_of_the_environment_are_no_length_of_a_response() -> None:
    spoken = replace(scored(5, answer=1.0), sampled=np.array([True, True, False, False, True]))
    found = batch_metrics([group(1, spoken)])
    assert found["rollout/response_tokens_max"] == 3
    assert found["rollout/turns"] == 2.0


def test_one_part_of_weight_1_is_the_reward() -> None:
    """Each group counts once, as in reward/mean, also if a response of it is missing."""
    rewards = ([1.0, 0.0, 0.0], [1.0])
    found = batch_metrics([group(i, *(scored(3, answer=r) for r in values)) for i, values in enumerate(rewards)])
    assert found["reward/part_answer"] == pytest.approx((1 / 3 + 1) / 2)


def test_spread_of_rewards() -> None:
    found = batch_metrics([group(1, scored(3, a=2.0), scored(3, a=0.0)), group(2, scored(3, a=1.0), scored(3, a=1.0))])
    assert (found["reward/min"], found["reward/max"]) == (0.0, 2.0)
    assert found["reward/std"] == pytest.approx(0.5**0.5)
    assert found["reward/group_std_mean"] == pytest.approx(0.5)


def test_rewards_and_pass_rates_by_source() -> None:
    """The first reward that applies decides what is correct; a source without a reward has no part of it."""
    groups = [
        of("sums", group(1, scored(3, answer=1.0, form=0.5), scored(3, answer=0.0, form=0.5))),
        of("words", group(2, scored(3, form=1.0), scored(3, form=1.0))),
        of("words", group(3, scored(3, form=0.0), scored(3, form=0.0))),
    ]
    found = batch_metrics(groups)
    assert (found["groups/source_sums"], found["groups/source_words"]) == (1, 2)
    assert (found["reward/source_sums"], found["reward/source_words"]) == (1.0, 0.5)
    assert (found["pass_rate/source_sums"], found["pass_rate/source_words"]) == (0.5, 0.5)
    assert found["pass_rate/mean"] == 0.5
    assert found["reward/part_answer"] == 0.5
    assert found["reward/part_form"] == pytest.approx(0.5)


def test_the_step_that_they_missed_counts_expired_groups_once() -> None:
    """Also if a call is repeated, and if the buffer is opened again: the ledger knows which step it was."""
    config = ReplayConfig(groups_per_step=1, group_size=2, max_staleness=1)
    buffer = ReplayBuffer(config, ":memory:", num_steps=9)
    buffer.ledger.versions.add_step(0)
    buffer.ledger.versions.add_step(1)

    def ready(group_id: int, version: int, *tokens: int) -> None:
        buffer.ledger.admit(group_id, [Query(str(group_id), "p", "a")], version)
        made = group(group_id, *(replace(scored(n, answer=1.0), spans=rollout(n, version).spans) for n in tokens))
        buffer.ready(made)

    ready(1, 0, 20, 40)
    assert buffer.lease(2) == (None, None)
    ready(2, 2, 3, 5)
    for _ in range(2):
        summary, _batch = buffer.lease(2)
        assert summary is not None
        assert summary.metrics["drops/stale"] == 1
        assert summary.metrics["drops/stale_response_tokens_mean"] == 30.0
        assert summary.metrics["drops/stale_pass_rate"] == 1.0
        assert summary.metrics["rollout/response_tokens_mean"] == 4.0
    buffer.commit(2)
    ready(3, 2, 3, 5)
    summary, _batch = buffer.lease(3)
    assert summary is not None and "drops/stale" not in summary.metrics
