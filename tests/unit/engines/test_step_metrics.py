"""The metrics of a step against values computed by hand, on one rank."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from quatro_ray.engines.batches import TokenBatch
from quatro_ray.engines.sequence_parallel import Ranks
from quatro_ray.engines.step_metrics import RATIO_BINS, Collector

REWARDS = torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
VALID = torch.ones(2, 2, dtype=torch.bool)
# two tokens of rollout 0, one each of 1, 2 and 3; a token of the prompt; padding
TOKENS = TokenBatch(
    policy_logprobs=torch.tensor([-1.0, -2.0, -1.5, -0.5, -1.0, 0.0, 0.0]),
    behavior_logprobs=torch.tensor([-1.0, -2.5, -1.0, -0.5, -1.0, 0.0, 0.0]),
    advantage=torch.zeros(7),
    is_response=torch.tensor([True, True, True, True, True, False, False]),
    rollout_index=torch.tensor([0, 0, 1, 2, 3, 3, -1]),
    staleness=torch.tensor([0, 0, 2, 1, 300, 0, 0]),
    num_cells=4,
)
ENTROPY = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 9.0, 9.0])
LOSS = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 9.0, 9.0])
LIMITED = torch.tensor([True, False, False, False, False, True, True])


@pytest.fixture(autouse=True)
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def measured(*batches: TokenBatch, valid: torch.Tensor = VALID, has_reference: bool = True) -> dict[str, Any]:
    collector = Collector(4, torch.device("cpu"), Ranks(0, 1))
    for batch in batches:
        collector.add(batch, ENTROPY, LOSS, LIMITED)
        if has_reference:
            collector.add_reference_kl(ENTROPY, batch.is_response)
    return collector.reduce(REWARDS, valid)


def test_only_tokens_of_responses_count() -> None:
    found = measured(TOKENS)
    assert found["tokens/trained"] == 5
    assert found["policy_gradient/loss"] == pytest.approx(15 / 5)
    assert found["policy_gradient/limited_share"] == pytest.approx(1 / 5)
    assert found["policy/entropy"] == found["policy/reference_kl"] == pytest.approx(1.5 / 5)


def test_without_a_reference_there_is_no_kl_to_it() -> None:
    assert "policy/reference_kl" not in measured(TOKENS, has_reference=False)


def test_ratios_by_response_and_by_token() -> None:
    found = measured(TOKENS)
    # log-ratios of the responses: 0.5, −0.5, 0, 0
    weights = [math.exp(0.5), math.exp(-0.5), 1.0, 1.0]
    share = sum(weights) ** 2 / (4 * sum(w * w for w in weights))
    assert found["rollout_corr/eff_sample_size"] == pytest.approx(share, rel=1e-6)
    assert found["rollout_corr/query_eff_sample_size"][1] == pytest.approx(1.0)
    of_tokens = [1.0, math.exp(0.5), math.exp(-0.5), 1.0, 1.0]
    share = sum(of_tokens) ** 2 / (5 * sum(w * w for w in of_tokens))
    assert found["rollout_corr/token_eff_sample_size"] == pytest.approx(share, rel=1e-6)
    kl = (0.5**2 / 2 + math.exp(-0.5) - 1 + 0.5) / 2
    assert found["policy/realised_kl_nats"] == pytest.approx([kl, 0.0], rel=1e-6)
    counts = found["rollout_corr/log_ratio_tokens"]
    middle = RATIO_BINS // 2
    assert {i - middle: n for i, n in enumerate(counts) if n} == {-5: 1, 0: 3, 5: 1}


def test_the_effective_sample_size_of_tokens_does_not_fall_with_length() -> None:
    """Responses of 2,000 tokens, whose log-ratios have a standard deviation of 0.1 nats."""
    torch.manual_seed(0)
    n = 2000
    index = torch.arange(4).repeat_interleave(n)
    long = TokenBatch(
        policy_logprobs=0.1 * torch.randn(4 * n),
        behavior_logprobs=torch.zeros(4 * n),
        advantage=torch.zeros(4 * n),
        is_response=torch.ones(4 * n, dtype=torch.bool),
        rollout_index=index,
        staleness=torch.ones_like(index),
        num_cells=4,
    )
    collector = Collector(4, torch.device("cpu"), Ranks(0, 1))
    collector.add(long, torch.zeros(4 * n), torch.zeros(4 * n), torch.zeros(4 * n, dtype=torch.bool))
    found: dict[str, Any] = collector.reduce(REWARDS, VALID)
    assert found["rollout_corr/token_eff_sample_size"] == pytest.approx(math.exp(-0.01), abs=1e-3)
    assert found["rollout_corr/eff_sample_size"] < 0.5


def test_staleness_is_a_histogram_with_an_end() -> None:
    found = measured(TOKENS)
    assert found["off_policy/staleness_tokens"] == {0: 2, 1: 1, 2: 1, 256: 1}
    assert found["off_policy/staleness_max"] == 256
    assert found["off_policy/staleness_mean"] == pytest.approx((1 + 2 + 256) / 5)


def test_agreement_is_told_of_tokens_on_version_alone() -> None:
    assert measured(TOKENS)["rollout_corr/logprob_abs_diff"] == pytest.approx(0.5 / 2)
    stale = replace(TOKENS, staleness=torch.ones(7, dtype=torch.int64))
    assert measured(stale)["rollout_corr/logprob_abs_diff"] is None


def test_far_ratios_stay_in_the_outermost_bins() -> None:
    far = replace(TOKENS, policy_logprobs=TOKENS.behavior_logprobs + torch.tensor([99.0, -99.0, 0, 0, 0, 0, 0]))
    counts = measured(far)["rollout_corr/log_ratio_tokens"]
    assert (counts[0], counts[-1], sum(counts)) == (1, 1, 5)


def test_micro_batches_add_up() -> None:
    once, twice = measured(TOKENS), measured(TOKENS, TOKENS)
    assert twice["tokens/trained"] == 10
    share = "rollout_corr/token_eff_sample_size"
    for name in ("policy_gradient/loss", "policy/entropy", "off_policy/staleness_mean", share):
        assert twice[name] == pytest.approx(once[name])


def test_rewards_of_valid_rollouts_alone() -> None:
    found = measured(TOKENS)
    assert found["reward/mean"] == 0.75 and found["reward/frac_zero_std"] == 0.5
    found = measured(TOKENS, valid=torch.tensor([[True, False], [True, True]]))
    assert found["reward/mean"] == 1.0 and found["reward/frac_zero_std"] == 1.0
