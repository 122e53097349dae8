"""Metrics of a step, summed over micro-batches and ranks; rates stay numerator and denominator until the end.

Shape letters: Q queries, G rollouts of a query, N tokens of a micro-batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quatro_ray.algorithms.advantages import group_mean
from quatro_ray.algorithms.importance import effective_sample_share, sequence_sums, token_drift
from quatro_ray.engines.batches import TokenBatch
from quatro_ray.engines.sequence_parallel import Ranks
from quatro_ray.types import StepMetrics

_SUMS = (
    "tokens", "loss", "entropy", "limited", "on_version_tokens", "on_version_error", "reference_kl", "weight",
    "squared_weight",
)  # fmt: skip
_MAX_STALENESS_BIN = 256
_MAX_LOG_WEIGHT = 30.0
"""Bound on the logarithm of importance weights in effective sample sizes, so that they stay finite."""
RATIO_BIN_NATS = 0.1
RATIO_BINS = 41
"""Number of bins of log π_θ/β, each RATIO_BIN_NATS wide and the middle one around 0; the outermost hold all beyond."""


class Collector:
    """Accumulates what one rank sees during a step; `reduce` is a collective.

    Args:
        num_cells: Q·G.
        ranks: this rank and the others.

    Attributes:
        entropy: nats per token of the global batch, once `reduce` was called.
    """

    entropy: float

    def __init__(self, num_cells: int, device: torch.device, ranks: Ranks) -> None:
        self._ranks = ranks
        self._sums = torch.zeros(len(_SUMS), dtype=torch.float64, device=device)
        self._log_ratio = torch.zeros(num_cells, dtype=torch.float64, device=device)
        self._drift = torch.zeros_like(self._log_ratio)
        self._staleness = torch.zeros(_MAX_STALENESS_BIN + 1, dtype=torch.float64, device=device)
        self._ratios = torch.zeros(RATIO_BINS, dtype=torch.float64, device=device)
        self._has_reference = False

    def add(self, t: TokenBatch, entropy: Tensor, per_token_loss: Tensor, limited: Tensor) -> None:
        """Add a micro-batch.

        Args:
            t: the tokens from which its loss was computed.
            entropy: [N], nats.
            per_token_loss: [N], not normalised.
            limited: bool [N], tokens on which a clip, a truncation or a mask of the loss acted.
        """
        mask = t.is_response
        difference = (t.proximal_logprobs - t.behavior_logprobs).double() * mask
        weight = difference.clamp(max=_MAX_LOG_WEIGHT).exp() * mask
        on_version = mask & (t.staleness == 0)
        self._add("tokens", mask)
        self._add("loss", per_token_loss * mask)
        self._add("entropy", entropy * mask)
        self._add("limited", limited & mask)
        self._add("on_version_tokens", on_version)
        self._add("on_version_error", difference.abs() * on_version)
        self._add("weight", weight)
        self._add("squared_weight", weight.square())
        self._log_ratio += sequence_sums(difference, t.rollout_index, len(self._log_ratio))
        self._drift += sequence_sums(token_drift(difference), t.rollout_index, len(self._drift))
        self._staleness += _counts(t.staleness[mask], _MAX_STALENESS_BIN + 1)
        self._ratios += _counts((difference[mask] / RATIO_BIN_NATS).round().long() + RATIO_BINS // 2, RATIO_BINS)

    def add_reference_kl(self, per_token: Tensor, mask: Tensor) -> None:
        """Add KL(π_θ ‖ π_ref) of a micro-batch: [N], nats, counted where mask, bool [N], is True."""
        self._has_reference = True
        self._add("reference_kl", per_token * mask)

    def _add(self, name: str, values: Tensor) -> None:
        self._sums[_SUMS.index(name)] += values.double().sum()

    def reduce(self, rewards: Tensor, valid: Tensor) -> StepMetrics:
        """Return the metrics of the global batch, the same on every rank; a collective.

        Without a reference policy there is no `policy/reference_kl`.

        Args:
            rewards: float64 [Q, G].
            valid: bool [Q, G].
        """
        for tensor in (self._sums, self._log_ratio, self._drift, self._staleness, self._ratios):
            self._ranks.sum(tensor)
        total = dict(zip(_SUMS, self._sums.tolist(), strict=True))
        tokens = total["tokens"]
        log_ratio = self._log_ratio.view_as(rewards)
        weights = log_ratio.clamp(max=_MAX_LOG_WEIGHT).exp()
        histogram = {s: int(n) for s, n in enumerate(self._staleness.tolist()) if n}
        self.entropy = total["entropy"] / tokens
        reward = group_mean(rewards, valid)
        zero_std = torch.where(valid, rewards, rewards[:, :1]).std(1, correction=0) == 0
        return {
            "reward/mean": float(reward.mean()),
            "reward/frac_zero_std": float(zero_std.double().mean()),
            "policy_gradient/loss": total["loss"] / tokens,  # does not measure progress
            "policy_gradient/limited_share": total["limited"] / tokens,
            "policy/entropy": self.entropy,
            "policy/realised_kl_nats": group_mean(self._drift.view_as(rewards), valid).tolist(),
            **({"policy/reference_kl": total["reference_kl"] / tokens} if self._has_reference else {}),
            "rollout_corr/eff_sample_size": float(effective_sample_share(weights[valid], valid[valid])),
            # weights of whole responses degenerate with length, those of tokens do not
            "rollout_corr/token_eff_sample_size": total["weight"] ** 2
            / max(tokens * total["squared_weight"], torch.finfo(torch.float64).tiny),
            "rollout_corr/query_eff_sample_size": effective_sample_share(weights, valid).tolist(),
            "rollout_corr/log_ratio_tokens": [int(n) for n in self._ratios.tolist()],
            # agreement of engine and learner under the same weights; None if no token is from this version
            "rollout_corr/logprob_abs_diff": total["on_version_error"] / total["on_version_tokens"]
            if total["on_version_tokens"]
            else None,
            "off_policy/staleness_mean": sum(s * n for s, n in histogram.items()) / tokens,
            "off_policy/staleness_max": max(histogram, default=0),
            "off_policy/staleness_tokens": histogram,
            "tokens/trained": int(tokens),
        }


def _counts(bins: Tensor, size: int) -> Tensor:
    """Count the indices in each bin, int64 [n] → float64 [size]; those outside count in the outermost bins."""
    return torch.bincount(bins.clamp(0, size - 1), minlength=size).double()
