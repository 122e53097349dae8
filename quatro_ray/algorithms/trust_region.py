"""Solver of the per-query trust region: exact, for all queries at once.

For a query with rewards r_i of samples drawn from β, the best policy within KL(π ‖ β) ≤ ε is
π*(y)/β(y) = exp(η r(y)) / E_β[exp(η r)] with η = 1/λ (QUATRO, arXiv 2602.04620; derivation in
docs/algorithm.md). On samples with base weights b_i: t_i = η r_i − log Σ_j b_j exp(η r_j), w_i = b_i exp(t_i),
and η is the root of KL(w ‖ b) = Σ_i w_i t_i = ε.

Method: rewards are standardised per query to x = (r − max r)/range ∈ [−1, 0], so that η is in units of 1/range. The
start comes from the cumulants of x. A few Newton steps follow for all queries, clamped to [Hoeffding's bound, cap].
One evaluation yields t and checks the KL. Queries that fail the check get Newton steps inside a bracket that every
iteration narrows.

Shape letters: Q queries, G rollouts of a query, B queries of a block. Internal tensors are [G, B], because sums over
the leading dimension vectorise. Sources: QUATRO for the problem; quatro_ray, docs/algorithm.md, for the solver, unless
a function names another.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

_MAX_ITERATIONS = 200
"""Never reached: from the 20th iteration on every second one bisects, and 65 bisections exhaust float64."""
_TOLERANCE = 3e-9
"""Relative tolerance of the KL; the documented accuracy is 1e-8."""
_PRECISE_BELOW = 1e-4
"""Budget in nats below which the KL is computed without cancellation, which takes twice the time."""
_PLAIN_STEPS = 5
_SETTLED_STEP = 3e-5
"""Relative change of η at which Newton stops: convergence is quadratic, so the error left is about its square."""
_NOISE_BELOW = 3e-7
"""Budget in nats below which a Newton step with plain sums would be less accurate than the start."""
_LARGEST_ETA = 1e300
_CPU_BLOCK = 131_072
"""Samples per block: few enough for its tensors to stay in the cache, enough for each call on [B] to pay off."""


class Status(IntEnum):
    """Which constraint determines the solution of a query."""

    ACTIVE = 0  # KL equals the budget
    SLACK = 1  # the cap on η binds before the budget does
    VOID = 2  # all rewards equal: nothing to prefer


@dataclass(frozen=True)
class Solution:
    """Solution of every query's trust region.

    Attributes:
        eta: float64 [Q], η = 1/λ, in 1/reward; the cap if slack or void.
        target_log_ratio: float64 [Q, G], t_i = log π*(y_i)/β(y_i), nats; 0 if invalid, of base weight 0, or void.
        kl_nats: float64 [Q], the KL reached, nats; within 1e-8 relative of the budget if active.
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
    max_eta: Tensor | float,
    base_weights: Tensor | None = None,
) -> Solution:
    """Solve the dual problem of every query: max E_π[r] subject to KL(π ‖ β) ≤ ε; QUATRO, arXiv 2602.04620.

    Args:
        rewards: [Q, G], any real dtype; computed in float64.
        valid: bool [Q, G], False where a group is smaller than G.
        kl_budget_nats: [Q] or one number, > 0, ε in nats per response.
        max_eta: [Q] or one number, > 0 and finite, cap on η (a floor on λ), in 1/reward. Without a cap the
            targets of failures would go to −∞ if the constraint is slack.
        base_weights: [Q, G] ≥ 0, for samples that do not represent β equally; uniform if None. Only their
            proportions within a query count; a weight below 1e-307 of the query's sum counts as 0.

    Raises:
        ValueError: an argument has the wrong shape; or a query has a NaN or infinite reward, no valid sample of
            positive weight, a bad weight, or a budget or cap that is not positive and finite. The message names the
            argument or the first such query.
    """
    _check_shapes(rewards, valid, base_weights)
    budget = _per_query("kl_budget_nats", kl_budget_nats, rewards)
    max_eta = _per_query("max_eta", max_eta, rewards)
    num_queries, group = rewards.shape
    uniform = base_weights is None and bool(valid.all())
    eta, kl = torch.empty_like(budget), torch.empty_like(budget)
    status = torch.empty(num_queries, dtype=torch.int8, device=rewards.device)
    target = torch.empty(num_queries, group, dtype=torch.float64, device=rewards.device)
    block = max(1, _CPU_BLOCK // group) if rewards.device.type == "cpu" and group else max(1, num_queries)
    memory = torch.empty(3 * group * block, dtype=torch.float64, device=rewards.device)
    for start in range(0, num_queries, block):
        rows = slice(start, min(start + block, num_queries))
        work = memory[: 3 * group * (rows.stop - start)].view(3, group, -1)
        weights = None if base_weights is None else base_weights[rows]
        groups = _standardise(
            rewards[rows], None if uniform else valid[rows], weights, budget[rows], max_eta[rows], work
        )
        if groups is None:
            raise _diagnose(rewards, valid, base_weights)
        scaled_eta, t, reached = _solve_block(groups)
        void, capped = groups.span == 0, scaled_eta >= groups.cap
        eta[rows] = torch.where(capped, max_eta[rows], torch.minimum(scaled_eta / groups.span, max_eta[rows]))
        kl[rows] = reached.clamp_min_(0).masked_fill_(void, 0)
        target[rows] = t.mul_(groups.pushed).T
        status[rows] = torch.where(void, int(Status.VOID), capped.to(torch.int8))
    return Solution(eta, target, kl, status)


def _check_shapes(rewards: Tensor, valid: Tensor, base_weights: Tensor | None) -> None:
    """Raise ValueError if shapes do not agree; bad numbers are found later, by `_standardise`."""
    if rewards.ndim != 2 or rewards.shape != valid.shape:
        raise ValueError(f"rewards and valid must both be [Q, G]; got {tuple(rewards.shape)}, {tuple(valid.shape)}")
    if base_weights is not None and base_weights.shape != rewards.shape:
        raise ValueError(f"base_weights must be [Q, G] = {tuple(rewards.shape)}; got {tuple(base_weights.shape)}")
    if len(rewards) and not rewards.shape[1]:
        raise ValueError("query 0 has no valid sample: rewards have a group size of 0")


def _per_query(name: str, value: Tensor | float, rewards: Tensor) -> Tensor:
    """Broadcast one number or [Q] to float64 [Q]; raise ValueError unless all are positive and finite."""
    numbers = torch.as_tensor(value, dtype=torch.float64, device=rewards.device)
    if numbers.ndim and numbers.shape != rewards.shape[:1]:
        raise ValueError(f"{name} must be one number or [Q] = [{len(rewards)}]; got {tuple(numbers.shape)}")
    bad = ~((numbers > 0) & (numbers < torch.inf))
    if bad.any():
        query = int(bad.expand(max(1, len(rewards))).nonzero()[0])
        number = float(numbers.expand(max(1, len(rewards)))[query])
        raise ValueError(f"query {query} has a {name} of {number}: not positive and finite")
    return numbers.expand(len(rewards)).contiguous()


def _diagnose(rewards: Tensor, valid: Tensor, base_weights: Tensor | None) -> ValueError:
    """Return the error for the first bad query, by a slow but exact search; called after `_standardise` refused."""
    r = torch.where(valid, rewards.to(torch.float64), 0.0)
    weights = valid.to(torch.float64) if base_weights is None else torch.where(valid, base_weights.to(torch.float64), 0)
    for bad, problem in (
        (~torch.isfinite(r).all(1), "has a reward that is NaN or infinite"),
        (~(torch.isfinite(weights) & (weights >= 0)).all(1), "has a base weight that is negative, NaN or infinite"),
        (~(weights > 0).any(1), "has no valid sample with a positive base weight"),
    ):
        if bad.any():
            return ValueError(f"query {int(bad.nonzero()[0])} {problem}")
    query = int((r.amax(1) - r.amin(1)).argmax())
    return ValueError(f"query {query} has rewards so far apart that their range overflows float64")


@dataclass(frozen=True)
class _Groups:
    """A block of B queries in standard form; a tensor [1, B] stands for [G, B] with equal rows.

    Attributes:
        x: [G, B], (r − max r)/range in [−1, 0]; 0 for samples that do not count.
        base: [G, B] or [1, B], base weights that sum to 1 over G; 0 for samples that do not count.
        pushed: float64 [G, B] or [B], 1; 0 for samples that do not count and for queries whose rewards are all equal.
        span: [B], range of the rewards.
        budget: [B], ε, nats.
        cap: [B], cap on η in units of 1/range.
        scratch: [2, G, B], overwritten by every evaluation, because fresh memory would cost more than the arithmetic.
        precise: whether some budget is so small that plain sums would cancel.
    """

    x: Tensor
    base: Tensor
    pushed: Tensor
    span: Tensor
    budget: Tensor
    cap: Tensor
    scratch: Tensor
    precise: bool

    def select(self, index: Tensor) -> _Groups:
        """Return the queries at `index`, with their own scratch."""
        return _Groups(
            self.x[:, index],
            self.base[:, index],
            self.pushed[..., index],
            self.span[index],
            self.budget[index],
            self.cap[index],
            self.x.new_empty(2, len(self.x), len(index)),
            self.precise,
        )


def _standardise(
    rewards: Tensor, valid: Tensor | None, base_weights: Tensor | None, budget: Tensor, max_eta: Tensor, work: Tensor
) -> _Groups | None:
    """Bring a block into standard form, or return None if a query in it is bad.

    Shifting and scaling the rewards changes neither the KL nor t.

    Args:
        rewards: [B, G].
        valid: bool [B, G]; None if all are valid and weights are uniform.
        base_weights: [B, G] or None.
        budget: [B], nats.
        max_eta: [B], 1/reward.
        work: [3, G, B], memory that the result keeps.
    """
    x = work[0].copy_(rewards.T)
    if valid is None:
        base = x.new_full((1, 1), 1 / len(x)).expand(1, len(rewards))
        counted, total, highest = None, budget, x.amax(0)
    else:
        base = valid.T.to(torch.float64) if base_weights is None else base_weights.T.to(torch.float64)
        base = torch.where(valid.T, base, 0.0)
        negative = base.amin(0) < 0
        base /= base.amax(0)
        total = base.sum(0).masked_fill_(negative, torch.nan)
        base /= total
        counted = base >= torch.finfo(torch.float64).tiny
        base *= counted
        highest = x.masked_fill(~counted, -torch.inf).amax(0)
        torch.where(counted, x, highest, out=x)
    x -= highest
    span = x.amin(0).neg_()
    if not torch.isfinite(span + total).all():
        return None
    distinct = span > 0
    x /= torch.where(distinct, span, 1.0)
    pushed = (distinct if counted is None else counted & distinct).to(x.dtype)
    cap = (max_eta * span).clamp_max_(_LARGEST_ETA)
    precise = bool(budget.amin() < _PRECISE_BELOW)
    return _Groups(x, base, pushed, span, budget, cap, work[1:], precise)


def _solve_block(groups: _Groups) -> tuple[Tensor, Tensor, Tensor]:
    """Return η [B] in units of 1/range, t [G, B] and the KL [B]; η equals the cap exactly if ε is not reached.

    A few plain Newton steps clamped to the first bracket suffice for nearly all queries; `_find_root` does the rest.
    """
    budget, low = groups.budget, _lower_bound(groups.budget)
    root_budget = budget.sqrt()
    eta = _start(groups)
    for _ in range(_PLAIN_STEPS):
        _, kl, slope = _plain_sums(groups, eta)
        step = _newton_step(kl, slope, root_budget)
        if groups.precise:
            step *= budget > _NOISE_BELOW
        before, eta = eta, torch.clamp(torch.addcmul(eta, eta, step), low, groups.cap)
        if _is_rare((eta - before).abs_() > _SETTLED_STEP * before):
            break
    t, kl, _ = _log_ratio(groups, eta)
    met = ((kl - budget).abs_() <= _TOLERANCE * budget) | ((eta == groups.cap) & (kl <= budget))
    index = (~met).nonzero().squeeze(1)
    if len(index):
        rest = groups.select(index)
        eta[index] = _find_root(rest, torch.minimum(eta[index].nan_to_num_(nan=1.0), rest.cap))
        t[:, index], kl[index], _ = _log_ratio(rest, eta[index])
    return eta, t, kl


def _is_rare(condition: Tensor) -> bool:
    """Return whether the condition holds for at most 1 in 16, too few for another step of the whole block."""
    return int(condition.sum()) * 16 <= len(condition)


def _start(groups: _Groups) -> Tensor:
    """Return a first η [B]: the series KL = σ²η²/2 + κ₃η³/3 + κ₄η⁴/8 + … inverted in d = √(2ε).

    The inverse is η = d/(σ (1 + c₁d + c₂d²)).
    """
    x, term = groups.scratch
    torch.mul(groups.x, groups.base, out=term)
    torch.sub(groups.x, term.sum(0), out=x)
    torch.mul(x, x, out=term).mul_(groups.base)
    variance = term.sum(0)
    third, fourth = term.mul_(x).sum(0), term.mul_(x).sum(0)
    first_order = (2 * groups.budget / variance).sqrt_()
    ratio = first_order / variance
    skew = third.mul_(ratio)
    kurtosis = fourth.mul_(ratio).mul_(first_order).addcmul_(groups.budget, variance.sign(), value=-6)
    bend = torch.addcmul(skew * (1 / 3), skew, skew, value=-1 / 6).add_(kurtosis, alpha=1 / 8)
    eta = first_order.div_(bend.add_(1).clamp_min_(0.25)).nan_to_num_(nan=0.0)
    return torch.clamp(eta, _lower_bound(groups.budget), groups.cap)


def _lower_bound(budget: Tensor) -> Tensor:
    """Return the least possible η [B]: x ∈ [−1, 0] has variance at most 1/4, so KL(η) ≤ η²/8 (Hoeffding 1963)."""
    return (8 * budget).sqrt_().mul_(1 - 1e-6)


def _plain_sums(groups: _Groups, eta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return log Σ b exp(ηx), KL, and dKL/d log η = Var_w(ηx), each [B].

    The KL has an absolute error of about 1e-16, which is too much at small ε.
    """
    term = torch.mul(groups.x, eta, out=groups.scratch[0]).exp_().mul_(groups.base)
    total = term.sum(0)
    mean = term.mul_(groups.x).sum(0).div_(total).mul_(eta)
    square = term.mul_(groups.x).sum(0).div_(total).mul_(eta).mul_(eta)
    log_total = total.log_()
    return log_total, mean - log_total, square.addcmul_(mean, mean, value=-1)


def _log_ratio(groups: _Groups, eta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return t [G, B] (in the scratch), KL [B] and Var_w(t) [B].

    If `precise`, the KL has a relative error of about 1e-16/√ε: KL = Σ b t eᵗ/(1 + s) − log(1 + s), with
    s = Σ b (eᵗ − 1), the rounding error of the normaliser.
    """
    t, w = groups.scratch
    if not groups.precise:
        log_total, kl, slope = _plain_sums(groups, eta)
        return torch.mul(groups.x, eta, out=t).sub_(log_total), kl, slope
    torch.mul(groups.x, eta, out=t)
    t -= torch.exp(t, out=w).mul_(groups.base).sum(0).log_()
    residue = torch.expm1(t, out=w).mul_(groups.base).sum(0)
    w += groups.base
    total, shift = 1 + residue, torch.log1p(residue)
    mean = w.mul_(t).sum(0).div_(total)
    square = w.mul_(t).sum(0).div_(total)
    return t.sub_(shift), mean - shift, square.addcmul_(mean, mean, value=-1)


def _newton_step(kl: Tensor, slope: Tensor, root_budget: Tensor) -> Tensor:
    """Return the Newton step in log η that brings √KL to √ε; √KL is nearly linear in η."""
    return kl.clamp_min(0).sqrt_().mul_(root_budget).sub_(kl).div_(slope).mul_(2)


def _find_root(groups: _Groups, eta: Tensor) -> Tensor:
    """Return η [B] by Newton steps inside a bracket that every iteration narrows; the cap if its KL is within ε.

    Source: safeguarded Newton, Press et al., "Numerical Recipes", section 9.4 (rtsafe).
    """
    low, high = _lower_bound(groups.budget), torch.full_like(eta, torch.inf)  # ∞: the cap has not been tried
    root_budget = groups.budget.sqrt()
    for iteration in range(_MAX_ITERATIONS):
        _, kl, slope = _log_ratio(groups, eta)
        below = kl < groups.budget
        low, high = torch.where(below, eta, low), torch.where(below, high, eta)
        done = (kl - groups.budget).abs() <= _TOLERANCE * groups.budget
        done |= (low >= groups.cap) | (high - low <= 1e-15 * low)
        if done.all():
            break
        newton = torch.minimum(eta + eta * _newton_step(kl, slope, root_budget), groups.cap)
        inside = (newton > low) & (newton < high)  # False for NaN
        if iteration >= 20 and iteration % 2:
            inside = torch.zeros_like(inside)
        middle = torch.where(high < torch.inf, low.sqrt() * high.sqrt(), groups.cap)
        eta = torch.where(done, eta, torch.where(inside, newton, middle))
    return eta
