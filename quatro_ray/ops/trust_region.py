"""The per-query trust region, solved exactly for all queries at once.

For a query with rewards r_i of samples drawn from β, the best policy within KL(π ‖ β) ≤ ε is
π*(y)/β(y) = exp(η r(y)) / E_β[exp(η r)] with η = 1/λ (QUATRO, arXiv 2602.04620; derivation in
docs/algorithm.md). On samples with base weights b_i: t_i = η r_i − log Σ_j b_j exp(η r_j), w_i = b_i exp(t_i),
and η is the root of KL(w ‖ b) = Σ_i b_i φ(t_i) = ε, with φ(t) = t eᵗ − eᵗ + 1 ≥ 0.

Shape letters: Q queries, G rollouts of a query.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

_MAX_ITERATIONS = 200
_KL_TOLERANCE = 1e-10
"""Relative; the promise is 1e-8."""
_SERIES_BELOW = 0.25
_SERIES = tuple((k - 1) / math.factorial(k) for k in range(2, 16))


class Status(IntEnum):
    """How the constraint of a query ended."""

    ACTIVE = 0  # KL equals the budget
    SLACK = 1  # the cap on η binds before the budget does
    VOID = 2  # all rewards equal: nothing to prefer


@dataclass(frozen=True)
class Solution:
    """Per query.

    Attributes:
        eta: float64 [Q], 1/λ, in 1/reward; the cap where slack or void.
        target_log_ratio: float64 [Q, G], t_i = log π*(y_i)/β(y_i), nats; 0 where invalid or void.
        kl_nats: float64 [Q], the KL reached.
        status: int8 [Q], values of `Status`.
    """

    eta: Tensor
    target_log_ratio: Tensor
    kl_nats: Tensor
    status: Tensor


@torch.no_grad()
def solve(
    rewards: Tensor,
    valid: Tensor,
    kl_budget_nats: Tensor | float,
    max_eta: float,
    base_weights: Tensor | None = None,
) -> Solution:
    """Solves the dual of every query.

    Args:
        rewards: [Q, G], any float dtype; computed in float64.
        valid: bool [Q, G]; False where a group is smaller than G.
        kl_budget_nats: [Q] or one number, > 0.
        max_eta: cap on η (a floor on λ), in 1/reward, > 0 and finite. Without it the targets of
            failures run to −∞ where the constraint is slack.
        base_weights: [Q, G] ≥ 0, for samples that do not stand for β equally; uniform if None.

    Raises:
        ValueError: naming the first query with a NaN or infinite reward, no valid sample, or a
            budget that is not positive.
    """
    if rewards.ndim != 2 or rewards.shape != valid.shape:
        raise ValueError(f"rewards and valid must both be [Q, G]; got {tuple(rewards.shape)}, {tuple(valid.shape)}")
    if not (max_eta > 0 and math.isfinite(max_eta)):
        raise ValueError(f"max_eta={max_eta} must be positive and finite")
    r = rewards.to(torch.float64)
    budget = torch.as_tensor(kl_budget_nats, dtype=torch.float64, device=r.device).expand(len(r)).clone()
    base = _base(valid, base_weights)
    _check(r, valid, budget, base)

    x, span = _standardise(r, base)
    cap = max_eta * span
    void = span == 0
    _, kl_at_cap, _ = _evaluate(x, base, cap)
    slack = ~void & (kl_at_cap <= budget)
    scaled_eta = _find_root(x, base, budget, cap, settled=void | slack)
    t, kl, _ = _evaluate(x, base, scaled_eta)

    eta = torch.where(void | slack, max_eta, scaled_eta / torch.where(void, 1.0, span))
    t = torch.where(valid & ~void[:, None], t, 0.0)
    status = torch.where(void, int(Status.VOID), torch.where(slack, int(Status.SLACK), int(Status.ACTIVE)))
    return Solution(eta, t, torch.where(void, 0.0, kl), status.to(torch.int8))


def _base(valid: Tensor, base_weights: Tensor | None) -> Tensor:
    """float64 [Q, G], rows summing to 1 (0 for a row without a valid sample, which _check refuses)."""
    weights = valid.to(torch.float64) if base_weights is None else base_weights.to(torch.float64) * valid
    return weights / weights.sum(1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)


def _check(r: Tensor, valid: Tensor, budget: Tensor, base: Tensor) -> None:
    for bad, problem in (
        (~((base > 0) & valid).any(1), "has no valid sample with a positive base weight"),
        ((~torch.isfinite(base) | (base < 0)).any(1), "has a base weight that is negative, NaN or infinite"),
        ((~torch.isfinite(r) & valid).any(1), "has a reward that is NaN or infinite"),
        (~(budget > 0) | ~torch.isfinite(budget), "has a kl_budget_nats that is not positive and finite"),
    ):
        if bad.any():
            raise ValueError(f"query {int(bad.nonzero()[0])} {problem}")


def _standardise(r: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
    """x = (r − E_b[r]) / range in [−1, 1], and the range [Q]; shift and scale of rewards change neither KL nor t."""
    used = base > 0
    low = torch.where(used, r, torch.inf).amin(1, keepdim=True)
    span = torch.where(used, r, -torch.inf).amax(1, keepdim=True) - low
    x = torch.where(used, r - low, 0.0) / torch.where(span == 0, 1.0, span)
    x = torch.where(used, x - (base * x).sum(1, keepdim=True), 0.0)
    return x, span.squeeze(1)


def _evaluate(x: Tensor, base: Tensor, eta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """t [Q, G], KL(w ‖ b) [Q] and Var_w(x) [Q] at η [Q], without cancellation at small η."""
    z = eta[:, None] * x
    top = torch.where(base > 0, z, -torch.inf).amax(1, keepdim=True)
    by_shift = top + (base * torch.exp(z - top)).sum(1, keepdim=True).log()
    by_log1p = torch.log1p((base * torch.expm1(z.clamp(-1, 1))).sum(1, keepdim=True))
    t = z - torch.where(eta[:, None] < 1, by_log1p, by_shift)
    w = base * torch.exp(torch.where(base > 0, t, 0.0))
    kl = (base * _phi(torch.where(base > 0, t, 0.0))).sum(1)
    variance = (w * (x - (w * x).sum(1, keepdim=True)).square()).sum(1)
    return t, kl, variance


def _phi(t: Tensor) -> Tensor:
    """t eᵗ − eᵗ + 1 = Σ_{k≥2} (k−1)/k! tᵏ; the series where the closed form would cancel."""
    small = t.clamp(-_SERIES_BELOW, _SERIES_BELOW)
    series = torch.zeros_like(t)
    for coefficient in reversed(_SERIES):
        series = series * small + coefficient
    return torch.where(t.abs() < _SERIES_BELOW, series * small.square(), t * t.exp() - torch.expm1(t))


def _find_root(x: Tensor, base: Tensor, budget: Tensor, cap: Tensor, settled: Tensor) -> Tensor:
    """Newton on √KL − √ε, which is nearly linear in η near 0, inside a bracket that no iteration can leave."""
    low, high = torch.zeros_like(cap), cap.clone()
    std = (base * x.square()).sum(1).sqrt()
    start = torch.minimum((2 * budget).sqrt() / torch.where(std == 0, 1.0, std), cap)
    eta = torch.where(settled, cap, start)
    root_budget = budget.sqrt()
    for _ in range(_MAX_ITERATIONS):
        _, kl, variance = _evaluate(x, base, eta)
        done = settled | ((kl - budget).abs() <= _KL_TOLERANCE * budget) | (high - low <= 1e-15 * high)
        if done.all():
            break
        low = torch.where(kl < budget, eta, low)
        high = torch.where(kl < budget, high, eta)
        root_kl = kl.sqrt()
        step = (root_kl - root_budget) * 2 * root_kl / (eta * variance)
        newton = eta - step
        middle = torch.where(low > 0, (low * high).sqrt(), high / 2)
        inside = (newton > low) & (newton < high)  # False for NaN
        eta = torch.where(done, eta, torch.where(inside, newton, middle))
    return eta
