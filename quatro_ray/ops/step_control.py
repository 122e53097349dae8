"""How far an optimiser step may move the policy, and how far back it is taken.

Adaptive optimisers erase the scale of the loss, so no loss bounds the step by itself. After the step, the realised
KL(π_k ‖ π_k+1) of each query q is held against its budget min(ε_max, ε_window/(1 + s_q)): an old sample says less
about where the policy may go, and drift adds up while samples wait. KL is quadratic in a small step, so that moving
back along it to the fraction α = (KL/budget)^−1/2 makes it fit.

Shape letters: N tokens, B rollouts, Q queries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from quatro_ray.ops.importance import sequence_sums, truncated

_WEIGHT_TRUNCATION = 2.0
_MAX_MOVES = 3
_TRUSTED_FACTOR = 0.5
"""A move to at least this fraction is believed; after a larger one, KL is measured again."""
_TOLERANCE = 1.05


@torch.no_grad()
def rollout_kl(
    stepped_logprobs: Tensor,
    start_logprobs: Tensor,
    behavior_logprobs: Tensor,
    is_response: Tensor,
    rollout_index: Tensor,
    num_rollouts: int,
) -> Tensor:
    """float64 [B]: Σ_t w_t (ρ_t − 1 − log ρ_t), ρ_t = π_k+1/π_k, w_t = min(π_k/β, 2); nats per response.

    Its mean estimates KL(π_k ‖ π_k+1) by the chain rule over tokens (the truncation biases it downwards where
    π_k has left β); no term is negative. All arguments [N].
    """
    # the bound keeps exp finite where a token has become e³⁰ times likelier: no budget allows that
    log_ratio = (stepped_logprobs - start_logprobs).double().clamp(max=30)
    weight, _ = truncated(start_logprobs.double() - behavior_logprobs, _WEIGHT_TRUNCATION)
    terms = weight * (torch.expm1(log_ratio) - log_ratio)
    return sequence_sums(torch.where(is_response, terms, 0.0), rollout_index, num_rollouts)


@dataclass(frozen=True)
class StepLimits:
    """ε_window and ε_max, nats per response."""

    window_kl_nats: float
    max_kl_nats: float

    def budget(self, staleness: Tensor) -> Tensor:
        """[Q] → [Q]: of one step, by the staleness of the query's samples, in steps."""
        return (self.window_kl_nats / (1 + staleness)).clamp(max=self.max_kl_nats)


@dataclass(frozen=True)
class ProbeKl:
    """KL(π_k ‖ π_k+1) of the queries probed. kl_nats, staleness: float64 [Q], nats per response and steps."""

    kl_nats: Tensor
    staleness: Tensor

    def share_of_budget(self, limits: StepLimits) -> float:
        """Mean over queries of KL_q over its budget; 1 where that is just used up."""
        return float((self.kl_nats / limits.budget(self.staleness)).mean())


@dataclass(frozen=True)
class StepReport:
    """kl_nats: mean over queries of the step as the optimiser made it. share_of_budget: of that step.

    kept: fraction α of the step that was kept, 1 where control did not act. num_measured: passes made.
    """

    probe: ProbeKl
    share_of_budget: float
    kept: float
    num_measured: int

    def metrics(self) -> dict[str, object]:
        return {
            "step_control/kl_nats": self.probe.kl_nats.tolist(),
            "step_control/share_of_budget": self.share_of_budget,
            "step_control/kept": self.kept,
            "step_control/acted": float(self.kept < 1),
            "step_control/num_measured": float(self.num_measured),
        }


def control_step(measure: Callable[[], ProbeKl], move_to: Callable[[float], None], limits: StepLimits) -> StepReport:
    """Call after the optimiser's step; leaves the weights where the budget allows.

    Args:
        measure: KL between the step's first weights and the present ones, the same number on every rank.
        move_to: puts the weights at start + α·(stepped − start).
    """
    probe = first = measure()
    num_measured, kept = 1, 1.0
    first_share = share = first.share_of_budget(limits)
    for _ in range(_MAX_MOVES):
        if share <= _TOLERANCE:
            break
        factor = share**-0.5
        kept *= factor
        move_to(kept)
        if factor >= _TRUSTED_FACTOR:
            break
        probe = measure()
        num_measured += 1
        share = probe.share_of_budget(limits)
    return StepReport(first, first_share, kept, num_measured)
