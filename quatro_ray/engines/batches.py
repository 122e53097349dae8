"""A learner batch as objectives see it: the whole of it before the gradient, then one micro-batch at a time.

Shape letters: Q queries, G rollouts, N tokens of a micro-batch, M response tokens of the global batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from quatro_ray.algorithms import importance
from quatro_ray.types import LearnerBatch


@dataclass(frozen=True)
class StepBatch:
    """The global batch before any gradient, the same on every rank.

    Attributes:
        rewards: float64 [Q, G]; valid: bool [Q, G].
        rollout_index: int64 [M], cell of [Q·G]; staleness: int64 [M], optimiser steps.
        log_ratio: float64 [M], log π_k − log β; None where the objective did not ask for it.
    """

    rewards: Tensor
    valid: Tensor
    rollout_index: Tensor
    staleness: Tensor
    log_ratio: Tensor | None

    def per_rollout(self, values: Tensor) -> Tensor:
        """[M] → [Q, G], sums."""
        return importance.sequence_sums(values.double(), self.rollout_index, self.rewards.numel()).view_as(self.rewards)

    def lengths(self) -> Tensor:
        """float64 [Q, G], response tokens."""
        return self.per_rollout(torch.ones_like(self.rollout_index))

    def query_staleness(self) -> Tensor:
        """float64 [Q], mean over the query's response tokens."""
        return self.per_rollout(self.staleness).sum(1) / self.lengths().sum(1).clamp(min=1)

    def sequence_log_ratio(self) -> Tensor:
        """float64 [Q, G]; only for objectives that ask for log-ratios."""
        assert self.log_ratio is not None
        return self.per_rollout(self.log_ratio)


@dataclass(frozen=True)
class TokenBatch:
    """What a per-token loss may look at; all [N]. `advantage` is that of the token's rollout.

    `policy_logprobs` carries the gradient and is 0 outside of responses, as are the other log-probs;
    `staleness` is 0 there, `rollout_index` −1 in padding.
    """

    policy_logprobs: Tensor
    behavior_logprobs: Tensor
    advantage: Tensor
    is_response: Tensor
    rollout_index: Tensor
    staleness: Tensor
    num_cells: int

    @property
    def proximal_logprobs(self) -> Tensor:
        """The policy at the start of the step: with one optimiser step a batch, the current one, detached."""
        return self.policy_logprobs.detach()

    def log_ratio(self, level: importance.Level = "token") -> Tensor:
        """log π_θ − log β at a level, with gradient."""
        ratio = self.policy_logprobs - self.behavior_logprobs
        return importance.leveled(level, ratio, self.is_response, self.rollout_index, self.num_cells)


def make_step_batch(batch: LearnerBatch, log_ratio: Tensor | None, device: torch.device) -> StepBatch:
    """`log_ratio`: float64 [M], of the micro-batches of rank 0, then those of rank 1, …"""
    everyone = [micro for rank in batch.micro_batches for micro in rank]
    index = np.concatenate([micro.rollout_index[micro.is_response] for micro in everyone])
    staleness = np.concatenate([micro.staleness[micro.is_response] for micro in everyone])
    return StepBatch(
        rewards=torch.from_numpy(batch.rewards).to(device),
        valid=torch.from_numpy(batch.valid).to(device),
        rollout_index=torch.from_numpy(index).to(device),
        staleness=torch.from_numpy(staleness).to(device),
        log_ratio=log_ratio,
    )


def make_token_batch(t: dict[str, Tensor], policy_logprobs: Tensor, advantage: Tensor) -> TokenBatch:
    """`t`: tensors of types.MicroBatch by name. policy_logprobs: [N]. advantage: [Q, G]."""
    response, index = t["is_response"], t["rollout_index"]
    return TokenBatch(
        policy_logprobs=torch.where(response, policy_logprobs, 0.0),
        behavior_logprobs=t["behavior_logprobs"],
        advantage=advantage.flatten()[index.clamp(min=0)].to(policy_logprobs.dtype),
        is_response=response,
        rollout_index=index,
        staleness=t["staleness"],
        num_cells=advantage.numel(),
    )
