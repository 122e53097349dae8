"""How far an optimiser step may move the policy, and how far back it is taken.

Adaptive optimisers erase the scale of the loss, so no loss bounds the step by itself. After the step, the realised
KL(π_k ‖ π_k+1) per token of each query q is held against its budget min(ε_max, ε_window/(1 + s_q)): an old sample
says less about where the policy may go, and drift adds up while samples wait. KL is quadratic in a small step, so
that moving back along it to the fraction α = (KL/budget)^−1/2 makes it fit. The fraction kept last time is where the
next step is measured first, so that one pass mostly does.

Shape letters: N tokens, B rollouts, Q queries.
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
_MAX_PASSES = 3
_ENOUGH = (0.8, 1.05)
"""A step that was moved back is left alone where its KL over its budget lies in between."""
_TRUSTED = (0.5, 2.0)
"""A move by a factor in between is believed; after another one, KL is measured again."""


@torch.no_grad()
def rollout_kl(
    stepped_logprobs: Tensor,
    start_logprobs: Tensor,
    behavior_logprobs: Tensor,
    is_response: Tensor,
    rollout_index: Tensor,
    num_rollouts: int,
) -> Tensor:
    """float64 [B]: Σ_t w_t (ρ_t − 1 − log ρ_t), ρ_t = π_k+1/π_k, w_t = min(π_k/β, 2); nats.

    Its mean estimates KL(π_k ‖ π_k+1) of a response by the chain rule over tokens (the truncation biases it
    downwards where π_k has left β); no term is negative. All arguments [N].
    """
    # the bound keeps exp finite where a token has become e³⁰ times likelier: no budget allows that
    log_ratio = (stepped_logprobs - start_logprobs).double().clamp(max=30)
    weight, _ = truncated(start_logprobs.double() - behavior_logprobs, _WEIGHT_TRUNCATION)
    terms = weight * (torch.expm1(log_ratio) - log_ratio)
    return sequence_sums(torch.where(is_response, terms, 0.0), rollout_index, num_rollouts)


@dataclass(frozen=True)
class StepLimits:
    """ε_window and ε_max, nats per token."""

    window_kl_nats: float
    max_kl_nats: float

    def budget(self, staleness: Tensor) -> Tensor:
        """[Q] → [Q]: of one step, by the staleness of the query's samples, in steps."""
        return (self.window_kl_nats / (1 + staleness)).clamp(max=self.max_kl_nats)


@dataclass(frozen=True)
class ProbeKl:
    """KL(π_k ‖ π_k+1) of the queries probed. kl_nats, staleness: float64 [Q], nats per token and steps."""

    kl_nats: Tensor
    staleness: Tensor

    def share_of_budget(self, limits: StepLimits) -> float:
        """Mean over queries of KL_q over its budget; 1 where that is just used up."""
        return float((self.kl_nats / limits.budget(self.staleness)).mean())


@dataclass(frozen=True)
class StepReport:
    """What became of a step.

    Attributes:
        kl_nats: float64 [Q], of what was kept of it; budget_nats: float64 [Q]. Both per token.
        share_of_budget: KL over budget of the step as the optimiser made it, by the quadratic law.
        kept: fraction α of the step, 1 where control did not act. num_passes: measurements made.
    """

    kl_nats: Tensor
    budget_nats: Tensor
    share_of_budget: float
    kept: float
    num_passes: int

    def metrics(self) -> dict[str, object]:
        return {
            "step_control/kl_nats": self.kl_nats.tolist(),
            "step_control/budget_nats": self.budget_nats.tolist(),
            "step_control/share_of_budget": self.share_of_budget,
            "step_control/kept": self.kept,
            "step_control/acted": float(self.kept < 1),
            "step_control/num_passes": float(self.num_passes),
        }


class StepControl:
    """One for a run: it remembers the fraction that was kept last.

    Attributes:
        kept: that fraction, in (0, 1]; all that a checkpoint has to hold of it.
    """

    def __init__(self, limits: StepLimits) -> None:
        self._limits = limits
        self.kept = 1.0

    def control(self, measure: Callable[[], ProbeKl], move_to: Callable[[float], None]) -> StepReport:
        """Call after the optimiser's step; leaves the weights where the budget allows.

        Args:
            measure: KL between the step's first weights and the present ones, the same number on every rank.
            move_to: puts the weights at start + α·(stepped − start).

        Raises:
            TrainingDiverged: the KL is not finite, so that no fraction of the step is known to be safe.
        """
        kept = self.kept
        if kept < 1:
            move_to(kept)
        num_passes = 0
        while num_passes < _MAX_PASSES:
            probe, measured_at = measure(), kept
            num_passes += 1
            share = probe.share_of_budget(self._limits)
            if not math.isfinite(share):
                raise TrainingDiverged(
                    f"the policy after the optimiser's step has a KL of {share} times its budget: lower "
                    "learner.learning_rate"
                )
            if share <= _ENOUGH[1] and (kept == 1 or share >= _ENOUGH[0]):
                break
            kept = min(1.0, kept * max(share, 1e-12) ** -0.5)
            move_to(kept)
            if _TRUSTED[0] <= kept / measured_at <= _TRUSTED[1]:
                break
        self.kept = kept
        return StepReport(
            kl_nats=probe.kl_nats * (kept / measured_at) ** 2,
            budget_nats=self._limits.budget(probe.staleness),
            share_of_budget=share / measured_at**2,
            kept=kept,
            num_passes=num_passes,
        )
