"""A learner batch as tensors: the global batch before the gradient, then one micro-batch at a time.

Shape letters: Q queries, G rollouts of a query, N tokens of a micro-batch, M response tokens of the global batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from quatro_ray.algorithms import importance
from quatro_ray.algorithms.aggregation import BatchSize
from quatro_ray.types import LearnerBatch, MicroBatch, StepMetrics

_ROUNDING = 1e-9
"""Largest advantage that counts as 0: the mean of rewards that are all equal may differ from them by rounding."""


@dataclass(frozen=True)
class MicroBatchTensors:
    """A types.MicroBatch on a device; every field is [N].

    Attributes:
        token_ids: int64, inputs.
        position_ids: int64, starting at 0 for each sequence (this is what separates them).
        target_ids: int64, the token that follows; 0 where `is_response` is False.
        is_response: bool, True where the target is a token that the policy sampled.
        rollout_index: int64, cell of the flat [Q·G] list of rollouts, −1 for padding.
        behavior_logprobs: float32, nats, 0 where not `is_response`.
        staleness: int64, optimiser steps since the policy that sampled the target; 0 where not `is_response`.
    """

    token_ids: Tensor
    position_ids: Tensor
    target_ids: Tensor
    is_response: Tensor
    rollout_index: Tensor
    behavior_logprobs: Tensor
    staleness: Tensor

    @classmethod
    def copy_from(cls, micro: MicroBatch, device: torch.device) -> MicroBatchTensors:
        """Copy the arrays to the device; those from Ray's object store are read-only and cannot be shared."""
        return cls(**{name: torch.tensor(value, device=device) for name, value in vars(micro).items()})

    @classmethod
    def concatenate(cls, rows: Sequence[MicroBatchTensors]) -> MicroBatchTensors:
        """Join rows along their tokens, in order: [N₁], [N₂], … → [N₁ + N₂ + …]."""
        return cls(**{name: torch.cat([getattr(row, name) for row in rows]) for name in vars(rows[0])})

    def select(self, kept: Tensor) -> MicroBatchTensors:
        """Return the tokens at which `kept`, bool [N], is True."""
        return MicroBatchTensors(**{name: value[kept] for name, value in vars(self).items()})


@dataclass(frozen=True)
class StepBatch:
    """The global batch before any gradient, the same on every rank.

    Attributes:
        rewards: float64 [Q, G].
        valid: bool [Q, G], False where a group is smaller than G.
        rollout_index: int64 [M], cell of the flat [Q·G] list of rollouts.
        staleness: int64 [M], optimiser steps.
        log_ratio: float64 [M], log π_k − log β, nats; None unless the objective needs it.
    """

    rewards: Tensor
    valid: Tensor
    rollout_index: Tensor
    staleness: Tensor
    log_ratio: Tensor | None = None

    def per_rollout(self, values: Tensor) -> Tensor:
        """Sum values [M] over the tokens of each rollout: float64 [Q, G]."""
        return importance.sequence_sums(values.double(), self.rollout_index, self.rewards.numel()).view_as(self.rewards)

    def lengths(self) -> Tensor:
        """Return the response tokens of each rollout: float64 [Q, G]."""
        return self.per_rollout(torch.ones_like(self.rollout_index))

    def query_staleness(self) -> Tensor:
        """Return the mean staleness of each query's response tokens: float64 [Q], optimiser steps."""
        return self.per_rollout(self.staleness).sum(1) / self.lengths().sum(1).clamp(min=1)

    def size(self, max_response_tokens: int, queries: Tensor | None = None) -> BatchSize:
        """Return what the loss of one optimiser step is divided by.

        Args:
            max_response_tokens: length of the longest possible response.
            queries: bool [Q], those that the step takes; all if None.
        """
        chosen = torch.ones_like(self.valid[:, 0]) if queries is None else queries
        tokens = torch.where(chosen, self.lengths().sum(1), 0.0)
        num_rollouts = int(self.valid[chosen].sum())
        return BatchSize(tokens, int(chosen.sum()), num_rollouts, self.valid.numel(), max_response_tokens)


@dataclass(frozen=True)
class Prepared:
    """Result of an objective's computation once per step, before any gradient.

    Attributes:
        advantage: float64 [Q, G].
        constant: one number that the token loss needs; only M2PO uses it.
        diagnostics: metrics of the step, mostly one value per query.
    """

    advantage: Tensor
    constant: float = 0.0
    diagnostics: StepMetrics = field(default_factory=dict)

    def is_informative(self, queries: Tensor | None = None) -> bool:
        """Return whether these queries, bool [Q], or any, prefer a rollout. If not, a step would follow noise alone."""
        chosen = self.advantage if queries is None else self.advantage[queries]
        return bool((chosen.abs() > _ROUNDING).any())


@dataclass(frozen=True)
class TokenBatch:
    """The inputs of a per-token loss; every tensor is [N].

    Attributes:
        policy_logprobs: float32, log π_θ of the targets with gradient; 0 where not `is_response`.
        behavior_logprobs: float32, log β of the targets; 0 where not `is_response`.
        advantage: float32, that of the token's rollout.
        is_response: bool.
        rollout_index: int64, −1 in padding.
        staleness: int64, optimiser steps; 0 where not `is_response`.
        num_cells: Q·G, the number of values that `rollout_index` may take.
        start_logprobs: float32, log-probs under the policy before the first optimiser step of the batch; None if the
            batch has one step, because they are then `policy_logprobs`.
    """

    policy_logprobs: Tensor
    behavior_logprobs: Tensor
    advantage: Tensor
    is_response: Tensor
    rollout_index: Tensor
    staleness: Tensor
    num_cells: int
    start_logprobs: Tensor | None = None

    @property
    def proximal_logprobs(self) -> Tensor:
        """Log-probs of the policy before the first optimiser step of the batch, without gradient."""
        return self.policy_logprobs.detach() if self.start_logprobs is None else self.start_logprobs

    def log_ratio(self, level: importance.Level = "token") -> Tensor:
        """Return log π_θ − log β at a level, [N], nats, with gradient."""
        ratio = self.policy_logprobs - self.behavior_logprobs
        return importance.leveled(level, ratio, self.is_response, self.rollout_index, self.num_cells)


def make_step_batch(batch: LearnerBatch, device: torch.device) -> StepBatch:
    """Copy what is known of all ranks to a device; `log_ratio` is None."""
    return StepBatch(
        rewards=torch.from_numpy(batch.rewards).to(device),
        valid=torch.from_numpy(batch.valid).to(device),
        rollout_index=torch.from_numpy(batch.rollout_index).to(device),
        staleness=torch.from_numpy(batch.staleness).to(device),
    )


def make_token_batch(
    micro: MicroBatchTensors, policy_logprobs: Tensor, prepared: Prepared, start_logprobs: Tensor | None = None
) -> TokenBatch:
    """Look up the advantage of each token and mask what is no response.

    Args:
        micro: N tokens, padding included.
        policy_logprobs: float32 [N], nats, with gradient.
        prepared: what the objective computed for the global batch.
        start_logprobs: float32 [N], nats; see `TokenBatch`.
    """
    advantage = prepared.advantage
    cell = micro.rollout_index.clamp(min=0)
    return TokenBatch(
        policy_logprobs=torch.where(micro.is_response, policy_logprobs, 0.0),
        behavior_logprobs=micro.behavior_logprobs,
        advantage=advantage.flatten()[cell].to(policy_logprobs.dtype),
        is_response=micro.is_response,
        rollout_index=micro.rollout_index,
        staleness=micro.staleness,
        num_cells=advantage.numel(),
        start_logprobs=start_logprobs,
    )
