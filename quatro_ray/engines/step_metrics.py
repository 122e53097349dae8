"""What a step measured, summed over micro-batches and ranks; ratios stay numerator and denominator until the end."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from quatro_ray.ops.advantages import group_mean, realised_kl
from quatro_ray.ops.importance import effective_sample_share, sequence_sums
from quatro_ray.replay.staleness import staleness

_SUMS = ("tokens", "loss", "entropy", "on_version_tokens", "on_version_error", "reference_kl")
_MAX_STALENESS_BIN = 256


class Collector:
    """Filled by one rank during a step; `reduce` is a collective."""

    def __init__(self, num_cells: int, learner_version: int, device: torch.device) -> None:
        self._version = learner_version
        self._sums = torch.zeros(len(_SUMS), dtype=torch.float64, device=device)
        self._log_ratio = torch.zeros(num_cells, dtype=torch.float64, device=device)
        self._staleness = torch.zeros(_MAX_STALENESS_BIN + 1, dtype=torch.float64, device=device)

    def add(self, policy_logprobs: Tensor, entropy: Tensor, per_token_loss: Tensor, t: dict[str, Tensor]) -> None:
        """All [N]; `t` holds the tensors of the micro-batch (types.MicroBatch)."""
        mask = t["is_response"]
        difference = (policy_logprobs - t["behavior_logprobs"]).double() * mask
        on_version = mask & (staleness(self._version, t["versions"]) == 0)
        self._add("tokens", mask)
        self._add("loss", per_token_loss * mask)
        self._add("entropy", entropy * mask)
        self._add("on_version_tokens", on_version)
        self._add("on_version_error", difference.abs() * on_version)
        self._log_ratio += sequence_sums(difference, t["rollout_index"], len(self._log_ratio))
        age = staleness(self._version, t["versions"][mask]).clamp(max=_MAX_STALENESS_BIN)
        self._staleness += torch.bincount(age, minlength=_MAX_STALENESS_BIN + 1).double()

    def add_reference_kl(self, per_token: Tensor, mask: Tensor) -> None:
        self._add("reference_kl", per_token * mask)

    def _add(self, name: str, values: Tensor) -> None:
        self._sums[_SUMS.index(name)] += values.double().sum()

    def reduce(self, rewards: Tensor, valid: Tensor) -> dict[str, Any]:
        """Metrics of the global batch, the same on every rank; lists are values per query."""
        for tensor in (self._sums, self._log_ratio, self._staleness):
            dist.all_reduce(tensor)
        total = dict(zip(_SUMS, self._sums.tolist(), strict=True))
        log_ratio = self._log_ratio.view_as(rewards)
        weights = log_ratio[valid].clamp(max=30).exp()
        histogram = {s: int(n) for s, n in enumerate(self._staleness.tolist()) if n}
        reward = group_mean(rewards, valid)
        zero_std = torch.where(valid, rewards, rewards[:, :1]).std(1, correction=0) == 0
        return {
            "reward/mean": float(reward.mean()),
            "reward/frac_zero_std": float(zero_std.double().mean()),
            "policy_gradient/loss": total["loss"] / total["tokens"],  # no measure of progress
            "policy/entropy": total["entropy"] / total["tokens"],
            "policy/realised_kl_nats": realised_kl(log_ratio, valid).tolist(),
            "policy/reference_kl": total["reference_kl"] / total["tokens"],
            "rollout_corr/eff_sample_size": float(effective_sample_share(weights)),
            # agreement of engine and learner where both had the same weights; None where no token is on version
            "rollout_corr/logprob_abs_diff": total["on_version_error"] / total["on_version_tokens"]
            if total["on_version_tokens"]
            else None,
            "off_policy/staleness_mean": sum(s * n for s, n in histogram.items()) / total["tokens"],
            "off_policy/staleness_max": max(histogram, default=0),
            "off_policy/staleness_tokens": histogram,
            "tokens/trained": int(total["tokens"]),
        }
