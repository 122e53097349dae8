"""Step control: bounds how far an optimiser step moves the policy, and moves it back along the step if needed.

Adaptive optimisers erase the scale of the loss, so no loss bounds the step by itself. After the step, the realised
KL(π_k ‖ π_k+1) per token of each query q is compared with its budget min(ε_max, ε_window/(1 + s_q)): an old sample
says less about where the policy may go, and drift adds up while samples wait. Step control searches for the longest
fraction α of the step that fits the budget. Measuring starts at the fraction that the step before kept, so one
measurement is mostly enough.

Source: quatro_ray, docs/algorithm.md; moving back along a step to meet a KL bound is the line search of TRPO
(arXiv 1502.05477, appendix C). Shape letters: N tokens, B rollouts, Q queries.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from quatro_ray.algorithms.importance import sequence_sums, truncated
from quatro_ray.errors import TrainingDiverged

_WEIGHT_TRUNCATION = 2.0
_MAX_PASSES = 8
_ENOUGH = (0.5, 1.05)
"""Range of KL over budget within which a step that was moved back stays as it is."""
_LONGER_NEXT = 0.8
"""KL over budget below which the next step is measured at a longer fraction first."""
_TRUSTED_SHARE = 2.0
"""KL over budget up to which moving back by its root is not measured: the KL is convex in α and 0 at 0, so it falls at
least in proportion, and ends at most √2 above its budget."""
_LARGEST_DECREASE = 0.01
_SMALLEST_KEPT = 1e-4
_LARGEST_POWER = 8.0


@torch.no_grad()
def rollout_kl(
    stepped_logprobs: Tensor,
    start_logprobs: Tensor,
    behavior_logprobs: Tensor,
    is_response: Tensor,
    rollout_index: Tensor,
    num_rollouts: int,
) -> Tensor:
    """Return Σ_t w_t (ρ_t − 1 − log ρ_t) of each rollout, ρ_t = π_k+1/π_k, w_t = min(π_k/β, 2).

    Its mean estimates KL(π_k ‖ π_k+1) of a response by the chain rule over tokens. No term is negative; the
    truncation biases the estimate downwards if π_k has moved away from β.

    Source: the estimator k3 of Schulman 2020, "Approximating KL divergence", with the truncated importance weights
    of IMPALA (arXiv 1802.01561, section 4.1).

    Args:
        stepped_logprobs: [N], log π_k+1 of the targets, nats.
        start_logprobs: [N], log π_k, nats.
        behavior_logprobs: [N], log β, nats.
        is_response: bool [N].
        rollout_index: int64 [N], −1 for padding.
        num_rollouts: B.

    Returns:
        float64 [B], nats per response.
    """
    # the clamp keeps exp finite if a token has become e³⁰ times likelier, which no budget allows anyway
    log_ratio = (stepped_logprobs - start_logprobs).double().clamp(max=30)
    weight, _ = truncated(start_logprobs.double() - behavior_logprobs, _WEIGHT_TRUNCATION)
    terms = weight * (torch.expm1(log_ratio) - log_ratio)
    return sequence_sums(torch.where(is_response, terms, 0.0), rollout_index, num_rollouts)


@dataclass(frozen=True)
class StepLimits:
    """Bounds of one step.

    Attributes:
        window_kl_nats: ε_window, nats per token, shared by the steps that a sample waits through.
        max_kl_nats: ε_max, nats per token, of any one step.
    """

    window_kl_nats: float
    max_kl_nats: float

    def budget(self, staleness: Tensor) -> Tensor:
        """Return min(ε_max, ε_window/(1 + s_q)), nats per token; staleness s_q: [Q], optimiser steps."""
        return (self.window_kl_nats / (1 + staleness)).clamp(max=self.max_kl_nats)


@dataclass(frozen=True)
class ProbeKl:
    """KL(π_k ‖ π_k+1) of the queries that were measured.

    Attributes:
        kl_nats: float64 [Q], nats per token.
        staleness: float64 [Q], optimiser steps.
    """

    kl_nats: Tensor
    staleness: Tensor

    def share_of_budget(self, limits: StepLimits) -> float:
        """Return the mean over queries of KL_q over its budget; 1 if the budget is just used up."""
        return float((self.kl_nats / limits.budget(self.staleness)).mean())


@dataclass(frozen=True)
class StepReport:
    """Outcome of step control for one step.

    Attributes:
        kl_nats: float64 [Q], KL of the part of the step that was kept, nats per token.
        budget_nats: float64 [Q], nats per token.
        share_of_budget: KL over budget of the part of the step that was kept.
        kept: fraction α of the step; 1 if control did not act.
        num_passes: measurements made after the step.
    """

    kl_nats: Tensor
    budget_nats: Tensor
    share_of_budget: float
    kept: float
    num_passes: int

    def metrics(self) -> dict[str, float | list[float]]:
        """Return the metrics by area/name."""
        return {
            "step_control/kl_nats": self.kl_nats.tolist(),
            "step_control/budget_nats": self.budget_nats.tolist(),
            "step_control/share_of_budget": self.share_of_budget,
            "step_control/kept": self.kept,
            "step_control/acted": float(self.kept < 1),
            "step_control/num_passes": float(self.num_passes),
        }


@dataclass(frozen=True)
class _Measured:
    """The KL at a fraction of the step, and its share of the budget."""

    kept: float
    share: float
    probe: ProbeKl


class _Bracket:
    """Measurements of one step: the longest fraction that fits its budget, and the shortest that does not."""

    def __init__(self) -> None:
        self.fits: _Measured | None = None
        self._exceeds: _Measured | None = None

    def add(self, measured: _Measured) -> None:
        if measured.share <= _ENOUGH[1]:
            self.fits = measured
            if self._exceeds and self._exceeds.kept <= measured.kept:
                self._exceeds = None
        else:
            self._exceeds = measured
            if self.fits and self.fits.kept >= measured.kept:
                self.fits = None

    def next(self, last: _Measured) -> float:
        """Return the fraction at which a power law through the measurements uses up the budget, in (0, 1].

        With one measurement the law is quadratic, as it is for small steps.
        """
        if self.fits and self._exceeds:
            # between two measurements the fraction stays inside, so that every pass narrows the bracket
            rise = math.log(self._exceeds.share / max(self.fits.share, 1e-12))
            low, width = self.fits.kept, math.log(self._exceeds.kept / self.fits.kept)
            power = min(max(rise / width, 1.0), _LARGEST_POWER)
            guess = -math.log(max(self.fits.share, 1e-12)) / power
            return low * math.exp(min(max(guess, 0.1 * width), 0.9 * width))
        return min(1.0, last.kept / math.sqrt(max(last.share, 1e-12)))


class StepControl:
    """The controller of a run's steps.

    Attributes:
        kept: fraction at which the next step is measured first, in (0, 1]: that which the last one kept, or more if it
            left room; its whole state for a checkpoint.
    """

    def __init__(self, limits: StepLimits) -> None:
        self._limits = limits
        self.kept = 1.0

    def control(self, measure: Callable[[], ProbeKl], move_to: Callable[[float], None]) -> StepReport:
        """Move the weights back as far as the budget demands; call it after the optimiser's step.

        The step ends at a measured fraction, or a little below one: never at a longer one that was not measured.

        Args:
            measure: returns the KL between the weights before the step and the present ones, the same on every rank.
            move_to: sets the weights to start + α·(stepped − start), given α.

        Raises:
            TrainingDiverged: the KL is not finite, or no part of the step that is worth taking fits the budget.
        """
        kept = self.kept
        if kept < 1:
            move_to(kept)
        bracket = _Bracket()
        num_passes = 0
        while num_passes < _MAX_PASSES:
            num_passes += 1
            last = self._measured(kept, measure())
            bracket.add(last)
            if last.share <= _ENOUGH[1] and (kept == 1 or last.share >= _ENOUGH[0]):
                break
            if last.kept <= _SMALLEST_KEPT and last.share > _ENOUGH[1]:
                raise _frozen(last)
            kept = max(bracket.next(last), _LARGEST_DECREASE * last.kept, _SMALLEST_KEPT)
            move_to(kept)
            if 1 < last.share <= _TRUSTED_SHARE and kept <= last.kept * last.share**-0.5 * (1 + 1e-9):
                break
        else:
            if bracket.fits is None:
                raise _frozen(last)
            last = bracket.fits
            kept = last.kept
            move_to(kept)
        self.kept = bracket.next(last) if last.share < _LONGER_NEXT and kept == last.kept else kept
        by_law = (kept / last.kept) ** 2  # 1 unless the last move was not measured
        return StepReport(
            kl_nats=last.probe.kl_nats * by_law,
            budget_nats=self._limits.budget(last.probe.staleness),
            share_of_budget=last.share * by_law,
            kept=kept,
            num_passes=num_passes,
        )

    def _measured(self, kept: float, probe: ProbeKl) -> _Measured:
        share = probe.share_of_budget(self._limits)
        if not math.isfinite(share):
            raise TrainingDiverged(
                f"the policy after the optimiser's step has a KL of {share} times its budget: lower "
                "learner.learning_rate"
            )
        return _Measured(kept, share, probe)


def _frozen(last: _Measured) -> TrainingDiverged:
    return TrainingDiverged(
        f"{last.kept:.2g} of the optimiser's step still has a KL of {last.share:.3g} times its budget, so training "
        "would stand still: lower learner.learning_rate; if that does not help, forward passes of the same weights "
        "differ by more than the budget, so raise learner.step_control.max_kl_nats_per_token"
    )
