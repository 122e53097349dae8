"""The product's loss on a batch that lies in memory as [Q, G, T]; Q queries, G rollouts of a query, T positions."""

from __future__ import annotations

import torch
from torch import Tensor

from quatro_ray.algorithms.aggregation import AggregationMode, aggregate
from quatro_ray.engines.batches import MicroBatchTensors, Prepared, StepBatch, make_token_batch
from quatro_ray.engines.objectives import Objective


def loss_of(
    objective: Objective,
    *,
    policy_logprobs: Tensor,
    behavior_logprobs: Tensor,
    counted: Tensor,
    rewards: Tensor,
    staleness: int,
    mode: AggregationMode | None = None,
) -> tuple[Tensor, Prepared]:
    """Return the loss of one optimiser step, and what the objective prepared.

    Args:
        objective: the method.
        policy_logprobs: [Q, G, T], log π_θ, nats, with gradient.
        behavior_logprobs: [Q, G, T], log β, nats.
        counted: bool [Q, G, T], the tokens of the responses.
        rewards: float64 [Q, G].
        staleness: that of every token, optimiser steps.
        mode: aggregation; the objective's own if None.
    """
    num_cells, length = rewards.numel(), counted.shape[-1]
    is_response = counted.flatten()
    cell = torch.arange(num_cells).repeat_interleave(length)
    unused = torch.zeros_like(cell)
    row = MicroBatchTensors(
        token_ids=unused,
        position_ids=unused,
        target_ids=unused,
        is_response=is_response,
        rollout_index=torch.where(is_response, cell, -1),
        behavior_logprobs=behavior_logprobs.flatten(),
        staleness=torch.full_like(cell, staleness),
    )
    flat = policy_logprobs.flatten()
    log_ratio = (flat.detach() - row.behavior_logprobs).double()[is_response]
    valid = torch.ones_like(rewards, dtype=torch.bool)
    whole = StepBatch(rewards, valid, cell[is_response], row.staleness[is_response], log_ratio)
    prepared = objective.prepare(whole)
    tokens = make_token_batch(row, flat, prepared)
    per_token, _ = objective.token_loss(tokens, prepared.constant)
    chosen = mode or objective.loss_agg_mode
    return aggregate(per_token, is_response, tokens.rollout_index, chosen, whole.size(length)), prepared
