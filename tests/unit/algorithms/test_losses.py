"""Per-token losses: golden values by hand, gradients against numbers."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from quatro_ray.algorithms import losses
from quatro_ray.algorithms.losses import TokenLoss


def logs(*ratios: float) -> Tensor:
    return torch.tensor([math.log(r) for r in ratios], dtype=torch.float64)


ZERO = torch.zeros(4, dtype=torch.float64)
SIGNS = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
RATIOS = logs(1.5, 1.5, 0.5, 0.5)
"""log π_θ with log β = 0, so that these are the importance ratios too."""


def check(got: TokenLoss, loss: list[float], limited: list[bool]) -> None:
    assert got.loss.tolist() == pytest.approx(loss)
    assert got.limited.tolist() == limited


def test_quatro() -> None:
    """−w A log π with w = min(ρ, 1.2) = 1.2, 1.2, 0.5, 0.5; π = 0.6, 0.6, 0.2, 0.2 has moved by 0.2 from β = 0.4."""
    policy, behavior = RATIOS + math.log(0.4), torch.full_like(RATIOS, math.log(0.4))
    up, down = math.log(0.6), math.log(0.2)
    got = losses.quatro(policy, behavior, SIGNS, RATIOS, max_shift=0.25, truncation=1.2)
    check(got, [-1.2 * up, 1.2 * up, -0.5 * down, 0.5 * down], [True, True, False, False])
    got = losses.quatro(policy, behavior, SIGNS, RATIOS, max_shift=0.15, truncation=1.2)
    check(got, [0, 1.2 * up, -0.5 * down, 0], [True, True, False, True])


def test_the_mask_of_quatro_is_that_of_dppo_and_leaves_rare_tokens_free() -> None:
    """An error of probability 0.002 that is a tenth as likely now is still pushed down."""
    torch.manual_seed(0)
    policy, behavior = torch.rand(2, 500).log()
    advantage = torch.randn(500)
    ratio = policy - behavior
    ours = losses.quatro(policy, behavior, advantage, ratio, max_shift=0.15, truncation=2.0)
    theirs = losses.dppo(policy, behavior, advantage, divergence="tv", threshold=0.15, upper=2.0)
    assert torch.equal(ours.loss, theirs.loss)
    free = losses.quatro(policy, behavior, advantage, ratio, max_shift=1.0, truncation=2.0)
    assert bool((free.loss != 0).all())
    assert 0.2 < float((ours.loss == 0).double().mean()) < 0.5
    rare = torch.tensor([0.0002]).log().requires_grad_()
    behind = torch.tensor([0.002]).log()
    loss = losses.quatro(rare, behind, -torch.ones(1), torch.zeros(1), max_shift=0.15, truncation=2.0).loss
    (got,) = torch.autograd.grad(loss.sum(), rare)
    assert float(got) == 1.0


def test_clipped() -> None:
    """ρ = 1.5 with A = 1 is clipped at 1.2; with A = −1 it is not, since the minimum is the pessimist."""
    got = losses.clipped(RATIOS, SIGNS, clip_low=0.2, clip_high=0.2)
    check(got, [-1.2, 1.5, -0.5, 0.8], [True, False, False, True])


def test_clip_higher_lets_good_tokens_grow_further() -> None:
    got = losses.clipped(RATIOS, SIGNS, clip_low=0.2, clip_high=0.6)
    check(got, [-1.5, 1.5, -0.5, 0.8], [False, False, False, True])


DUAL_CLIPPED: dict[str, Callable[..., TokenLoss]] = {
    "clipped": lambda p, a, c: losses.clipped(p, a, clip_low=0.2, clip_high=0.2, dual_clip=c),
    "decoupled_ppo": lambda p, a, c: losses.decoupled_ppo(
        p, 0 * p.detach(), 0 * p.detach(), a, clip_low=0.2, clip_high=0.2, weight_cap=5.0, dual_clip=c
    ),
    "tis_grpo": lambda p, a, c: losses.tis_grpo(
        p, 0 * p.detach(), 0 * p, a, clip_low=0.2, clip_high=0.2, truncation=2.0, dual_clip=c
    ),
    "mis_grpo": lambda p, a, c: losses.mis_grpo(
        p, 0 * p.detach(), 0 * p, a, clip_low=0.2, clip_high=0.2, mask_low=0.5, mask_high=2.0, dual_clip=c
    ),
    "m2po": lambda p, a, c: losses.m2po(p, 0 * p.detach(), a, log_ratio_threshold=math.inf, dual_clip=c),
}


@pytest.mark.parametrize("name", DUAL_CLIPPED)
def test_dual_clip(name: str) -> None:
    """Of a bad token with ratio 1000 beside 99 usual ones: all of the gradient without the dual clip, none with it."""
    log_ratio = torch.cat([logs(1000.0), torch.zeros(99, dtype=torch.float64)]).requires_grad_()
    advantage = torch.where(torch.arange(100) % 2 == 0, -1.0, 1.0).double()
    for dual_clip, share in ((None, 0.999), (3.0, 0.0)):
        got = DUAL_CLIPPED[name](log_ratio, advantage, dual_clip)
        (gradient,) = torch.autograd.grad(got.loss.sum(), log_ratio)
        assert float(gradient[0] ** 2 / gradient.square().sum()) == pytest.approx(share, abs=2e-3)
        assert bool(got.limited[0]) == (dual_clip is not None)
    assert got.loss[0] == 3.0


def test_gspo() -> None:
    """s_i = 1.5 and 0.5, whatever the token's own log-prob; clipped as a whole."""
    own = torch.tensor([-1.0, -2.0, -3.0, -4.0], dtype=torch.float64)
    got = losses.gspo(own, RATIOS, SIGNS, clip_low=0.1, clip_high=0.1)
    check(got, [-1.1, 1.5, -0.5, 0.9], [True, False, False, True])


def test_cispo() -> None:
    got = losses.cispo(RATIOS, ZERO, SIGNS, upper=1.2)
    a, b = 1.2 * math.log(1.5), 0.5 * math.log(0.5)
    check(got, [-a, a, -b, b], [True, True, False, False])


def test_decoupled_ppo() -> None:
    """π_prox = 0.75 β: u = 2, 2, 2/3, 2/3 clipped to [0.8, 1.2], times the weight 0.75; a cap below leaves all out."""
    proximal = logs(0.75, 0.75, 0.75, 0.75)
    clip = {"clip_low": 0.2, "clip_high": 0.2}
    got = losses.decoupled_ppo(RATIOS, proximal, ZERO, SIGNS, **clip, weight_cap=2.0)
    check(got, [-0.75 * 1.2, 0.75 * 2, -0.75 * 2 / 3, 0.75 * 0.8], [True, False, False, True])
    outside = losses.decoupled_ppo(RATIOS, proximal, ZERO - 2, SIGNS, **clip, weight_cap=2.0)
    check(outside, [0, 0, 0, 0], [True] * 4)


def test_interpolated_proximal() -> None:
    """α = 1/staleness: at 4, a quarter of β and three quarters of π_θ; on policy π_θ itself."""
    policy = torch.tensor([-1.0, -1.0, -1.0])
    got = losses.interpolated_proximal(torch.tensor([-2.0, -2.0, -2.0]), policy, torch.tensor([0, 1, 4]))
    assert got.tolist() == [-1.0, -2.0, -1.25]


def test_tis_grpo() -> None:
    """π_prox/β = 3 is truncated to 2; u = π_θ/π_prox = 1.5, 0.5 is clipped as in GRPO."""
    got = losses.tis_grpo(RATIOS, ZERO, logs(3, 0.5, 3, 0.5), SIGNS, clip_low=0.2, clip_high=0.2, truncation=2.0)
    check(got, [-2.4, 0.75, -1.0, 0.4], [True, False, True, True])


def test_mis_grpo() -> None:
    """π_prox/β = 3 lies outside of [0.4, 2] and counts nothing; 0.5 lies inside."""
    got = losses.mis_grpo(
        RATIOS, ZERO, logs(3, 0.5, 3, 0.5), SIGNS, clip_low=0.2, clip_high=0.2, mask_low=0.4, mask_high=2.0
    )
    check(got, [0, 0.75, 0, 0.4], [True, False, True, True])


def test_m2po() -> None:
    """Tokens 1 and 4 push outwards, by |log ρ| = 0.405 and 0.693; the threshold 0.5 drops the latter."""
    got = losses.m2po(RATIOS, ZERO, SIGNS, log_ratio_threshold=0.5)
    check(got, [-1.5, 1.5, -0.5, 0], [False, False, False, True])


def test_m2_threshold() -> None:
    """Outward |log ρ| = 0.1, 0.2, 0.4: running second moments 0.01, 0.025, 0.07."""
    log_ratio = torch.tensor([0.1, -0.2, 0.4, 0.9, -0.9])
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])
    assert losses.m2_threshold(log_ratio, advantage, 0.04) == pytest.approx(0.2)
    assert losses.m2_threshold(log_ratio, advantage, 0.0701) == math.inf
    assert losses.m2_threshold(log_ratio, advantage, 0.001) == 0.0
    assert losses.m2_threshold(log_ratio[3:], advantage[3:], 0.001) == math.inf  # nothing pushes outwards


def test_sapo() -> None:
    """(4/τ) σ(τ(ρ − 1)) A with τ = 1 for A > 0 and 2 for A < 0."""
    got = losses.sapo(RATIOS, ZERO, SIGNS, tau_positive=1.0, tau_negative=2.0)

    def gate(tau: float, ratio: float) -> float:
        return 4 / tau / (1 + math.exp(-tau * (ratio - 1)))

    check(got, [-gate(1, 1.5), gate(2, 1.5), -gate(1, 0.5), gate(2, 0.5)], [False] * 4)


OUTWARD_RATIOS = {"policy_logprobs": logs(0.75, 0.75, 0.25, 0.25), "behavior_logprobs": logs(0.5, 0.5, 0.5, 0.5)}
"""Ratios 1.5, 1.5, 0.5 and 0.5; with SIGNS, tokens 1 and 4 push outward. Every shift of probability is 0.25."""


@pytest.mark.parametrize(("threshold", "dropped"), [(0.24, True), (0.26, False)])
def test_dppo(threshold: float, dropped: bool) -> None:
    """−min(ρ, 1.2) A log π, and 0 for outward tokens whose shift of 0.25 exceeds the threshold."""
    got = losses.dppo(**OUTWARD_RATIOS, advantage=SIGNS, divergence="tv", threshold=threshold, upper=1.2)
    kept = 0.0 if dropped else 1.0
    a, b = 1.2 * math.log(0.75), 0.5 * math.log(0.25)
    check(got, [-a * kept, a, -b, b * kept], [True, True, False, dropped])


@pytest.mark.parametrize("divergence", ["tv", "kl"])
def test_dppo_masks_by_the_mass_that_moved_and_not_by_the_ratio(divergence: losses.Divergence) -> None:
    """The paper's example: 1e-4 → 1e-2 has ratio 100 and little mass, 0.99 → 0.80 has ratio 0.81 and much."""
    policy, behavior = logs(1e-2, 0.80, 0.80, 1e-2).requires_grad_(), logs(1e-4, 0.99, 0.99, 1e-4)
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)  # the last two push inward
    got = losses.dppo(policy, behavior, advantage, divergence=divergence, threshold=0.05, upper=math.inf)
    assert got.limited.tolist() == [False, True, False, False]
    (gradient,) = torch.autograd.grad(got.loss.sum(), policy)
    assert gradient.tolist() == pytest.approx([-100, 0, -0.80 / 0.99, 100])


def test_binary_divergence() -> None:
    """KL((0.5, 0.5) ‖ (0.75, 0.25)) = ln(2/√3), and KL((0.9, 0.1) ‖ (0.8, 0.2)) = 0.9 ln(9/8) − 0.1 ln 2."""
    policy, behavior = logs(0.75, 0.8, 0.3), logs(0.5, 0.9, 0.3)
    tv, kl = (losses.binary_divergence(policy, behavior, which) for which in ("tv", "kl"))
    assert tv.tolist() == pytest.approx([0.25, 0.1, 0.0])
    assert kl.tolist() == pytest.approx([math.log(2 / 3**0.5), 0.9 * math.log(9 / 8) - 0.1 * math.log(2), 0.0])


def test_binary_kl_is_finite_and_small_between_probabilities_that_are_almost_one() -> None:
    certain = torch.tensor([0.0, 0.0, -1e-7, -1e-4])
    got = losses.binary_divergence(certain, certain.flip(0), "kl")
    assert torch.isfinite(got).all() and float(got.abs().max()) < 0.002


def test_drpo() -> None:
    """−min(ρ, 1.2) g A log π with g = 1 ∓ 0.25/δ: at δ = 0.2 outward gradients point back, at 0.25 they vanish."""
    got = losses.drpo(**OUTWARD_RATIOS, advantage=SIGNS, threshold=0.2, upper=1.2)
    a, b = 1.2 * math.log(0.75), 0.5 * math.log(0.25)
    check(got, [0.25 * a, 2.25 * a, -2.25 * b, -0.25 * b], [True, True, False, True])
    at_boundary = losses.drpo(**OUTWARD_RATIOS, advantage=SIGNS, threshold=0.25, upper=math.inf)
    a, b = 1.5 * math.log(0.75), 0.5 * math.log(0.25)
    check(at_boundary, [0, 2 * a, -2 * b, 0], [False] * 4)


@pytest.mark.parametrize("threshold", [0.15, 12.5])
def test_drpo_has_the_gradient_of_its_regularised_objective(threshold: float) -> None:
    """−ρ A + |A| β (ρ − 1)²/(2δ), differentiated by autograd, over random probabilities."""
    rng = torch.Generator().manual_seed(0)
    policy, behavior, uniform = torch.rand((3, 1000), generator=rng, dtype=torch.float64)
    advantage = uniform - 0.5
    x = policy.log().requires_grad_()
    ratio = (x - behavior.log()).exp()
    objective = ratio * advantage - advantage.abs() * behavior * (ratio - 1) ** 2 / (2 * threshold)
    (expected,) = torch.autograd.grad(-objective.sum(), x)
    got = losses.drpo(x, behavior.log(), advantage, threshold=threshold, upper=math.inf)
    (gradient,) = torch.autograd.grad(got.loss.sum(), x)
    torch.testing.assert_close(gradient, expected)
    size = (gradient / (-ratio * advantage)).detach()  # relative to no regulariser
    assert 1 - 1 / threshold <= size.min() < 1 < size.max() <= 1 + 1 / threshold
    assert torch.equal(got.limited, size < 0)


UNBOUNDED: dict[str, Callable[[Tensor, Tensor, Tensor], TokenLoss]] = {
    "dppo_tv": lambda p, b, a: losses.dppo(p, b, a, divergence="tv", threshold=0.15, upper=math.inf),
    "dppo_kl": lambda p, b, a: losses.dppo(p, b, a, divergence="kl", threshold=0.05, upper=math.inf),
    "drpo": lambda p, b, a: losses.drpo(p, b, a, threshold=0.15, upper=math.inf),
}


@pytest.mark.parametrize("name", UNBOUNDED)
def test_on_policy_the_gradient_is_that_of_the_importance_weighted_policy_gradient(name: str) -> None:
    """At ρ = 1 neither mask nor regulariser acts: the gradient is that of −ρ A, which is −A."""
    policy = logs(0.999, 0.5, 0.1, 1e-6).requires_grad_()
    got = UNBOUNDED[name](policy, policy.detach().clone(), SIGNS)
    (gradient,) = torch.autograd.grad(got.loss.sum(), policy)
    torch.testing.assert_close(gradient, -SIGNS)
    assert not got.limited.any()


def test_reinforce() -> None:
    got = losses.reinforce(RATIOS, RATIOS, SIGNS, truncation=1.2)
    a, b = 1.2 * math.log(1.5), 0.5 * math.log(0.5)
    check(got, [-a, a, -b, b], [True, True, False, False])


def test_reference_kl() -> None:
    policy = torch.tensor([-1.0], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([-1.5], dtype=torch.float64)
    assert losses.reference_kl(policy, reference).item() == pytest.approx(math.exp(-0.5) + 0.5 - 1)
    assert torch.autograd.gradcheck(lambda x: losses.reference_kl(x, reference), policy)


CLIP: dict[str, Any] = {"clip_low": 0.2, "clip_high": 0.2}
ADVANTAGE = torch.tensor([0.7, -0.7, 0.7, -0.7, 0.7, -0.7, 0.7, -0.7], dtype=torch.float64)
START = logs(0.6, 0.6, 0.95, 0.95, 1.05, 1.05, 1.5, 1.5)
NONE = torch.zeros_like(START)

# For losses whose weights are detached, the gradient by numbers must hold the weights still: they are taken at START.
WITH_GRADIENT: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "quatro": (
        lambda x: losses.quatro(x - 1, NONE - 1, ADVANTAGE, x, max_shift=0.14, truncation=1.2).loss,
        lambda x: (
            -START.exp().clamp(max=1.2) * ADVANTAGE * (x - 1) * ~((START.abs() > 0.4) & (START * ADVANTAGE > 0))
        ),
    ),
    "clipped": (lambda x: losses.clipped(x, ADVANTAGE, **CLIP).loss,) * 2,
    "gspo": (
        lambda x: losses.gspo(x, x, ADVANTAGE, **CLIP).loss,
        lambda x: losses.clipped(START + x - START, ADVANTAGE, **CLIP).loss,
    ),
    "cispo": (
        lambda x: losses.cispo(x, NONE, ADVANTAGE, upper=1.2).loss,
        lambda x: -START.exp().clamp(max=1.2) * ADVANTAGE * x,
    ),
    "decoupled_ppo": (lambda x: losses.decoupled_ppo(x, NONE + 0.1, NONE, ADVANTAGE, **CLIP, weight_cap=2.0).loss,) * 2,
    "tis_grpo": (
        lambda x: losses.tis_grpo(x, NONE + 0.1, x, ADVANTAGE, **CLIP, truncation=1.2).loss,
        lambda x: START.exp().clamp(max=1.2) * losses.clipped(x - 0.1, ADVANTAGE, **CLIP).loss,
    ),
    "mis_grpo": (
        lambda x: losses.mis_grpo(x, NONE + 0.1, x, ADVANTAGE, **CLIP, mask_low=0.7, mask_high=1.2).loss,
        lambda x: (
            START.exp() * ((START.exp() < 1.2) & (START.exp() > 0.7)) * losses.clipped(x - 0.1, ADVANTAGE, **CLIP).loss
        ),
    ),
    "m2po": (lambda x: losses.m2po(x, NONE, ADVANTAGE, log_ratio_threshold=0.3).loss,) * 2,
    "sapo": (lambda x: losses.sapo(x, NONE, ADVANTAGE, tau_positive=1.0, tau_negative=1.05).loss,) * 2,
    "dppo": (
        lambda x: losses.dppo(x - 1, NONE - 1, ADVANTAGE, divergence="tv", threshold=0.14, upper=1.2).loss,
        lambda x: (
            -START.exp().clamp(max=1.2) * ADVANTAGE * (x - 1) * ~((START.abs() > 0.4) & (START * ADVANTAGE > 0))
        ),
    ),
    "drpo": (
        lambda x: losses.drpo(x - 1, NONE - 1, ADVANTAGE, threshold=0.1, upper=math.inf).loss,
        lambda x: -x.exp() * ADVANTAGE + ADVANTAGE.abs() * math.exp(-1) * (x.exp() - 1) ** 2 / 0.2,
    ),
    "reinforce": (
        lambda x: losses.reinforce(x, x, ADVANTAGE, truncation=1.2).loss,
        lambda x: -START.exp().clamp(max=1.2) * ADVANTAGE * x,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(WITH_GRADIENT))
def test_gradient_by_numbers(name: str) -> None:
    """Central differences of the loss with what is detached held still, against autograd of the loss itself."""
    loss, held_still = WITH_GRADIENT[name]
    x = START.clone().requires_grad_(True)
    (got,) = torch.autograd.grad(loss(x).sum(), x)
    h = 1e-6
    expected = (held_still(START + h) - held_still(START - h)) / (2 * h)  # elementwise: no token sees another
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-8)


def test_no_loss_lets_an_exploded_ratio_through_as_infinity() -> None:
    far = torch.tensor([200.0], dtype=torch.float64, requires_grad=True)
    one: dict[str, Any] = {"advantage": torch.ones(1)}
    zero = torch.zeros(1)
    for got in (
        losses.clipped(far, **one, **CLIP),
        losses.m2po(far, zero, **one, log_ratio_threshold=math.inf),
        losses.sapo(far, zero, **one, tau_positive=1.0, tau_negative=1.0),
        losses.dppo(far, zero, **one, divergence="kl", threshold=1e9, upper=math.inf),
        losses.drpo(far, zero, **one, threshold=1.0, upper=math.inf),
        losses.quatro(far, zero, torch.ones(1), far, max_shift=1.0, truncation=2.0),
    ):
        assert torch.isfinite(got.loss).all()
