"""Every objective on a packed batch: what it pushes, and that no split into micro-batches changes its gradient."""

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from benchmarks.whole_batch import loss_of
from quatro_ray.algorithms.aggregation import aggregate
from quatro_ray.config import ObjectiveConfig
from quatro_ray.engines.batches import MicroBatchTensors, TokenBatch, make_step_batch, make_token_batch
from quatro_ray.engines.objectives import OBJECTIVES, make_objective
from quatro_ray.replay.packing import pack
from quatro_ray.replay.staleness import Lineage
from quatro_ray.types import LearnerBatch, Outcome, Rollout, RolloutGroup, Score, VersionSpan
from tests.make import group, pack_all

VERSION = 6
NUM_QUERIES, GROUP_SIZE, LONGEST = 8, 4, 7
MODES = ("token_mean", "prompt_mean", "seq_mean_token_sum", "seq_mean_token_mean", "seq_mean_token_sum_norm")


EXAMPLE = Path(__file__).parents[3] / "examples" / "own_objective.py"


def objective_config(kind: str, **settings: Any) -> ObjectiveConfig:
    """The functions of kind `user` are those of the example."""
    if kind == "user":
        settings = {"loss": f"{EXAMPLE}:loss", "advantage": f"{EXAMPLE}:advantage"} | settings
    return TypeAdapter(ObjectiveConfig).validate_python({"kind": kind} | settings)


def make_groups() -> list[RolloutGroup]:
    """Rollouts of 1 to 7 tokens, of versions 0 to 5, with random log-probs and rewards."""
    rng = np.random.default_rng(0)

    def one() -> Rollout:
        n = int(rng.integers(1, LONGEST + 1))
        return Rollout(
            token_ids=rng.integers(1, 9, n).astype(np.int32),
            behavior_logprobs=-rng.exponential(size=n).astype(np.float32),
            spans=(VersionSpan(int(rng.integers(0, VERSION)), 0, n),),
            text="",
            finish_reason="stop",
            score=Score(float(rng.integers(0, 2)), Outcome.OK, ""),
        )

    return [group(q, *(one() for _ in range(GROUP_SIZE))) for q in range(NUM_QUERIES)]


def logprobs_of(theta: Tensor, t: MicroBatchTensors) -> Tensor:
    """A policy without context: the log-prob of a token depends on the position and the token."""
    return torch.log_softmax(theta, dim=-1)[t.position_ids, t.target_ids]


def gradient(kind: str, batches: list[LearnerBatch], theta: Tensor, mode: Any, **settings: Any) -> Tensor:
    objective = make_objective(objective_config(kind, **settings))
    cpu = torch.device("cpu")
    micro = [MicroBatchTensors.copy_from(m, cpu) for batch in batches for m in batch.micro_batches]
    ratios = [(logprobs_of(theta, t).detach() - t.behavior_logprobs).double()[t.is_response] for t in micro]
    step_batch = replace(make_step_batch(batches[0], cpu), log_ratio=torch.cat(ratios))
    prepared = objective.prepare(step_batch)
    size = step_batch.size(LONGEST)
    total = torch.zeros_like(theta)
    for t in micro:
        tokens = make_token_batch(t, logprobs_of(theta, t), prepared)
        per_token, limited = objective.token_loss(tokens, prepared.constant)
        assert per_token.shape == limited.shape == tokens.is_response.shape
        loss = aggregate(per_token, tokens.is_response, tokens.rollout_index, mode or objective.loss_agg_mode, size)
        total += torch.autograd.grad(loss, theta)[0]
    return total


def test_every_kind_of_the_configuration_has_its_objective() -> None:
    union = get_args(get_args(ObjectiveConfig)[0])
    assert {get_args(one.model_fields["kind"].annotation)[0] for one in union} == set(OBJECTIVES)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        *((kind, {}) for kind in sorted(OBJECTIVES)),
        ("dppo", {"divergence": "kl", "weight_upper": None}),
        ("drpo", {"threshold": 0.15, "weight_upper": 5.0}),
        ("user", {"advantage": None, "params": {"upper": 1.5}}),
    ],
)
def test_one_two_or_eight_micro_batches_give_equal_gradients(kind: str, settings: dict[str, Any]) -> None:
    groups = make_groups()
    torch.manual_seed(0)
    theta = torch.randn(12, 10, dtype=torch.float64, requires_grad=True)
    for mode in (None, *MODES):
        gradients = {}
        for limit in (500, 100, 26):
            batch = pack(groups, Lineage.unbroken(VERSION), num_ranks=1, rank=0, tokens_per_micro_batch=limit)
            gradients[len(batch.micro_batches)] = gradient(kind, [batch], theta, mode, **settings)
        assert sorted(gradients) == [1, 2, 8]
        whole = gradients.pop(1)
        assert whole.abs().max() > 1e-6
        for split in gradients.values():
            torch.testing.assert_close(split, whole, rtol=1e-9, atol=1e-12)


def test_ranks_do_not_matter_either() -> None:
    groups = make_groups()
    theta = torch.zeros(12, 10, dtype=torch.float64, requires_grad=True)
    one, two = (pack_all(groups, Lineage.unbroken(VERSION), num_ranks=n, tokens_per_micro_batch=60) for n in (1, 2))
    torch.testing.assert_close(gradient("quatro", one, theta, None), gradient("quatro", two, theta, None))


@pytest.mark.parametrize("kind", sorted(OBJECTIVES))
def test_on_policy_every_objective_makes_the_rewarded_rollout_likelier(kind: str) -> None:
    """Two rollouts of one token each; the gradient is a step up for the token that was rewarded."""
    theta = torch.zeros(12, 10, dtype=torch.float64, requires_grad=True)
    logp = np.full(1, -np.log(10), dtype=np.float32)

    def one(token: int, reward: float) -> Rollout:
        spans = (VersionSpan(VERSION, 0, 1),)
        return Rollout(np.array([token], dtype=np.int32), logp, spans, "", "stop", Score(reward, Outcome.OK, ""))

    good, bad = one(3, 1.0), one(4, 0.0)
    batch = pack(
        [group(0, good, bad, good, bad) for _ in range(NUM_QUERIES)],
        Lineage.unbroken(VERSION),
        num_ranks=1,
        rank=0,
        tokens_per_micro_batch=99,
    )
    step = -gradient(kind, [batch], theta, None)
    assert step[1, 3] > 1e-3  # position 1 is the last of the prompt of two tokens
    assert step[1, 4] < -1e-3


@pytest.mark.parametrize(
    ("kind", "settings", "expected"),
    [
        ("cispo", {"weight_upper": 0.9}, "weight_upper"),
        ("dapo", {"clip_low": 0.3}, "clip-higher"),
        ("gspo", {"clip_low": 0.2}, "clip_low"),
        ("sapo", {"tau_negative": 0.5}, "tau_positive"),
        ("mis_grpo", {"mask_high": 0.9}, "mask_high"),
        ("mis_grpo", {"mask_low": 1.0}, "mask_low"),
        ("decoupled_ppo", {"weight_cap": 1.0}, "weight_cap"),
        ("quatro", {"importance": {"truncation": 0.5}}, "truncation"),
        ("quatro", {"tilt_share": 1}, "tilt_share"),
        ("quatro", {"max_token_shift": 0}, "max_token_shift"),
        ("quatro", {"max_token_shift": 1.5}, "max_token_shift"),
        ("grpo", {"clip_low": 1.0}, "clip_low"),
        ("m2po", {"tau": 0}, "tau"),
        ("dppo", {"threshold": 1.0}, "nothing would be masked"),
        ("dppo", {"weight_upper": 0.9}, "weight_upper"),
        ("drpo", {"threshold": 0}, "threshold"),
        ("drpo", {"weight_upper": 0.9}, "weight_upper"),
        ("user", {"advantage": None, "needs_log_ratio": True}, "needs an advantage that reads"),
        ("user", {"loss": "no/such/file.py:loss"}, "there is no file"),
    ],
)
def test_known_traps_are_refused(kind: str, settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValidationError, match=expected):
        objective_config(kind, **settings)


@pytest.mark.parametrize("kind", sorted(OBJECTIVES.keys() - {"user"}))
def test_every_objective_says_where_it_comes_from(kind: str) -> None:
    assert any(word in (type(objective_config(kind)).__doc__ or "") for word in ("arXiv", "et al.", "REINFORCE"))


@pytest.mark.parametrize(
    ("settings", "limited"),
    [
        ({}, [False, True, True, False, True]),
        ({"divergence": "kl"}, [False, False, True, False, True]),
        ({"threshold": 0.1, "weight_upper": None}, [True, True, True, False, False]),
    ],
)
def test_dppo_has_the_default_threshold_of_its_divergence(settings: dict[str, Any], limited: list[bool]) -> None:
    """Three outward tokens shift by 0.14, 0.154, 0.18 (KL 0.041, 0.0498, 0.069); the inward ratios are 4.9 and 5.1."""
    policy = torch.tensor([0.64, 0.654, 0.68, 0.049, 0.051]).log()
    tokens = TokenBatch(
        policy_logprobs=policy,
        behavior_logprobs=torch.tensor([0.5, 0.5, 0.5, 0.01, 0.01]).log(),
        advantage=torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0]),
        is_response=torch.ones(5, dtype=torch.bool),
        rollout_index=torch.arange(5),
        staleness=torch.zeros(5, dtype=torch.int64),
        num_cells=5,
    )
    got = make_objective(objective_config("dppo", **settings)).token_loss(tokens, 0.0)
    assert got.limited.tolist() == limited


def test_quatro_reports_per_query() -> None:
    batch = pack(make_groups(), Lineage.unbroken(VERSION), num_ranks=1, rank=0, tokens_per_micro_batch=500)
    step_batch = make_step_batch(batch, torch.device("cpu"))
    reported: dict[str, Any] = make_objective(objective_config("quatro")).prepare(step_batch).diagnostics
    shares = [reported[f"trust_region/frac_{s}"] for s in ("active", "slack", "void")]
    assert sum(shares) == pytest.approx(1)
    assert shares[1] == 0
    informative = step_batch.rewards.std(1) > 0
    rates = step_batch.rewards.mean(1)[informative]
    assert reported["trust_region/target_kl_nats"] == pytest.approx((-0.3 * rates.log()).tolist())
    assert [1 / e for e in reported["trust_region/eta"]] == pytest.approx(reported["trust_region/lambda"])


def loss_gradient(
    kind: str, length: int, log_ratio: Tensor, staleness: int, mode: Any = None, successes: int = 4
) -> tuple[Tensor, dict[str, Any]]:
    """Return the gradient of the loss with respect to log-probs, [G, T], of one query in a batch of itself."""
    size = len(log_ratio)
    policy = log_ratio.clone().requires_grad_()
    loss, prepared = loss_of(
        make_objective(objective_config(kind)),
        policy_logprobs=policy[None],
        behavior_logprobs=torch.zeros(1, size, length),
        counted=torch.ones(1, size, length, dtype=torch.bool),
        rewards=(torch.arange(size) < successes).double()[None],
        staleness=staleness,
        mode=mode,
    )
    (found,) = torch.autograd.grad(loss, policy)
    return found, dict(prepared.diagnostics)


@pytest.mark.parametrize("length", [5, 50, 1000, 32_000])
@pytest.mark.parametrize("staleness", [0, 4, 64])
def test_quatro_is_active_at_every_length_and_staleness(length: int, staleness: int) -> None:
    for successes in range(1, 16):
        _, reported = loss_gradient("quatro", length, torch.zeros(16, length), staleness, successes=successes)
        assert reported["trust_region/frac_active"] == 1


@pytest.mark.parametrize("length", [5, 3072, 32_000])
def test_quatro_pushes_no_failure_up_by_noise(length: int) -> None:
    """The policy has drifted by one step of step control's limit, 4e-4 nats a token, in random directions."""
    torch.manual_seed(0)
    log_ratio = (2 * 4e-4) ** 0.5 * torch.randn(16, length)
    for successes in (1, 8, 15):
        gradient, _ = loss_gradient("quatro", length, log_ratio, 1, successes=successes)
        assert (gradient[:successes] < 0).all(), "the loss falls as a right response becomes likelier"
        assert (gradient[successes:] > 0).all()


@pytest.mark.parametrize("mode", [None, "token_mean", "seq_mean_token_mean"])
def test_a_batch_of_long_responses_has_the_gradient_mass_of_one_of_short_ones(mode: Any) -> None:
    torch.manual_seed(0)
    masses = []
    for length in (50, 500, 5000):
        log_ratio = (2 * 1e-3) ** 0.5 * torch.randn(16, length)
        masses.append(float(loss_gradient("quatro", length, log_ratio, 4, mode)[0].abs().sum()))
    assert max(masses) < 1.1 * min(masses)


def test_a_query_of_long_responses_weighs_as_much_as_one_of_short_ones() -> None:
    """Both in one batch, 50 and 5,000 tokens; under GRPO's and QUATRO's own aggregation, but not under a token mean."""
    counted = torch.zeros(2, 16, 5000, dtype=torch.bool)
    counted[0, :, :50], counted[1] = True, True
    rewards = (torch.arange(16) < 4).double().expand(2, 16)
    for kind, mode, low, high in (("quatro", None, 0.9, 1.1), ("grpo", None, 0.9, 1.1), ("dapo", None, 90, 110)):
        policy = torch.zeros(2, 16, 5000, requires_grad=True)
        loss, _ = loss_of(
            make_objective(objective_config(kind)),
            policy_logprobs=policy,
            behavior_logprobs=torch.zeros(2, 16, 5000),
            counted=counted,
            rewards=rewards,
            staleness=0,
            mode=mode,
        )
        mass = torch.autograd.grad(loss, policy)[0].abs().sum((1, 2))
        assert low < float(mass[1] / mass[0]) < high


@pytest.mark.parametrize("kind", sorted(OBJECTIVES))
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1])
def test_a_batch_without_preference_is_not_informative(kind: str, reward: float) -> None:
    """Engine and learner disagree by what bfloat16 does: 0.02 nats a token."""
    torch.manual_seed(0)
    shape = (3, 8, 200)
    _, prepared = loss_of(
        make_objective(objective_config(kind)),
        policy_logprobs=0.02 * torch.randn(shape),
        behavior_logprobs=torch.zeros(shape),
        counted=torch.ones(shape, dtype=torch.bool),
        rewards=torch.full(shape[:2], reward, dtype=torch.float64),
        staleness=0,
    )
    assert not prepared.is_informative()


def test_the_disagreement_of_engine_and_learner_is_not_amplified() -> None:
    """Noise of 0.02 nats a token on fresh samples changes the gradient of a query by less than a thousandth of it."""
    torch.manual_seed(0)
    exact, _ = loss_gradient("quatro", 2000, torch.zeros(16, 2000), 0)
    noise = 0.02 * torch.randn(16, 2000)
    noisy, _ = loss_gradient("quatro", 2000, noise, 0)
    by_weight = noisy / noise.exp()  # the importance weight of each token aside
    assert float((by_weight - exact).norm() / exact.norm()) < 2e-3
