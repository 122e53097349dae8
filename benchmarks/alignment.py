"""Cosine of each method's gradient with exact gradients, on tabular policies that have drifted from their samples.

    python -m benchmarks.alignment

A policy is a table of logits per position and previous token, so E[r], KL(π ‖ β) and their gradients are exact sums
over states. Samples come from β; π is β with random logits added, so much that KL(β ‖ π) is the drift. A response is
right if it has no error token at some critical positions. The gradient of a batch is compared with ∇E_π[r], the mean
over queries, and with the gradient of the method's own objective, Σ_q a_q E_π[r], where a_q is the mean gap between the
advantages of right and wrong responses.

Exits with 1 if either cosine of QUATRO is below that of GRPO by more than the noise of the comparison. Shape letters:
Q queries, G rollouts, T positions, V tokens.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

import torch
import typer
from pydantic import TypeAdapter
from torch import Tensor

from benchmarks.whole_batch import loss_of
from quatro_ray.config import ObjectiveConfig
from quatro_ray.engines.batches import Prepared
from quatro_ray.engines.objectives import OBJECTIVES, Objective, make_objective

BATCHES = {5: 100, 300: 20, 3000: 20}
"""Batches by length; the cosines of short responses scatter more, and cost less."""
DRIFTS = (0.3, 3.0, 12.0)
SUCCESS_RATES = (0.06, 0.15, 0.3, 0.5, 0.7, 0.9)
GROUP_SIZE = 16
VOCABULARY = 4
_CRITICAL = 10
STALENESS = 8


@dataclass(frozen=True)
class World:
    """Queries whose policies are tables.

    Attributes:
        behavior: float64 [Q, T, V, V], log β of a token after the previous one.
        logits: float64 [Q, T, V, V], of π, with gradient.
        critical: bool [T], positions at which token 0 is an error.
    """

    behavior: Tensor
    logits: Tensor
    critical: Tensor


def make_world(length: int, drift_nats: float, seed: int) -> World:
    """Return a world in which E_β[r] of the queries are SUCCESS_RATES and KL(β ‖ π) of each is `drift_nats`."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(SUCCESS_RATES), length, VOCABULARY, VOCABULARY)
    rates = torch.tensor(SUCCESS_RATES, dtype=torch.float64)
    critical = torch.zeros(length, dtype=torch.bool)
    critical[torch.linspace(0, length - 1, min(length, _CRITICAL)).long()] = True
    logits = torch.randn(shape, generator=generator, dtype=torch.float64)
    error = 1 - rates ** (1 / float(critical.sum()))
    # the logit of an error that gives it exactly this probability beside the other tokens
    odds = (error / (1 - error)).log()[:, None, None] + logits[:, critical, :, 1:].logsumexp(-1)
    logits[:, critical, :, 0] = odds
    behavior = logits.log_softmax(-1)
    direction = torch.randn(shape, generator=generator, dtype=torch.float64)
    low, high = torch.zeros(len(rates)), torch.full((len(rates),), 64.0)
    for _ in range(50):
        scale = (low + high) / 2
        moved = (logits + scale[:, None, None, None] * direction).log_softmax(-1)
        too_far = divergence(behavior, moved) > drift_nats
        low, high = torch.where(too_far, low, scale), torch.where(too_far, scale, high)
    return World(behavior, (logits + low[:, None, None, None] * direction).requires_grad_(), critical)


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return KL(p ‖ q) of whole responses, [Q], nats; both are [Q, T, V, V]."""
    return _over_states((log_p.exp() * (log_p - log_q)).sum(-1), log_p)


def _over_states(values: Tensor, log_policy: Tensor) -> Tensor:
    """Sum values [Q, T, V] of the previous tokens over the states that a policy [Q, T, V, V] visits, [Q]."""
    state = torch.zeros_like(values[:, 0])
    state[:, 0] = 1
    total = torch.zeros_like(state[:, 0])
    for t in range(values.shape[1]):
        total = total + (state * values[:, t]).sum(-1)
        state = (state[:, None] @ log_policy[:, t].exp())[:, 0]
    return total


def success_rate(log_policy: Tensor, critical: Tensor) -> Tensor:
    """Return E[r], [Q]: the probability of no error at a critical position."""
    state = torch.zeros_like(log_policy[:, 0, 0])
    state[:, 0] = 1
    for t in range(log_policy.shape[1]):
        state = (state[:, None] @ log_policy[:, t].exp())[:, 0]
        if critical[t]:
            state = torch.cat([torch.zeros_like(state[:, :1]), state[:, 1:]], dim=-1)
    return state.sum(-1)


@torch.no_grad()
def sample(world: World, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens and the tokens before them, int64 [Q, G, T], and rewards, float64 [Q, G]."""
    num_queries, length = world.behavior.shape[:2]
    query = torch.arange(num_queries)[:, None].expand(-1, GROUP_SIZE)
    noise = torch.empty(num_queries, GROUP_SIZE, length, VOCABULARY, dtype=torch.float64)
    noise.exponential_(generator=generator)
    previous = torch.zeros(num_queries, GROUP_SIZE, dtype=torch.int64)
    before, tokens = [], []
    for t in range(length):
        before.append(previous)
        previous = (world.behavior[query, t, previous].exp() / noise[:, :, t]).argmax(-1)
        tokens.append(previous)
    response = torch.stack(tokens, -1)
    wrong = ((response == 0) & world.critical).any(-1)
    return response, torch.stack(before, -1), (~wrong).double()


def batch_gradient(world: World, objective: Objective, generator: torch.Generator) -> tuple[Tensor, Prepared, Tensor]:
    """Return the ascent direction of one batch, flat, its advantages, and its rewards [Q, G]."""
    response, before, rewards = sample(world, generator)
    num_queries, _, length = response.shape
    index = (torch.arange(num_queries)[:, None, None], torch.arange(length), before, response)
    loss, prepared = loss_of(
        objective,
        policy_logprobs=world.logits.log_softmax(-1)[index],
        behavior_logprobs=world.behavior[index],
        counted=torch.ones_like(response, dtype=torch.bool),
        rewards=rewards,
        staleness=STALENESS,
    )
    (gradient,) = torch.autograd.grad(loss, world.logits)
    return -gradient.flatten(), prepared, rewards


@dataclass(frozen=True)
class Alignment:
    """Mean cosines of one method in one world.

    Attributes:
        with_reward: cosine with ∇E[r].
        with_own: cosine with the gradient of the method's own objective.
        with_reward_per_batch, with_own_per_batch: the cosines of which these are the means.
    """

    with_reward: float
    with_own: float
    with_reward_per_batch: list[float]
    with_own_per_batch: list[float]

    def figures(self) -> dict[str, float]:
        return {"with_reward": round(self.with_reward, 4), "with_own": round(self.with_own, 4)}


def align(world: World, objective: Objective, num_batches: int, seed: int) -> Alignment:
    """Compare the gradients of batches with the exact ones; the same seed gives every method the same samples."""
    generator = torch.Generator().manual_seed(seed)
    gradients, gaps = [], []
    for _ in range(num_batches):
        gradient, prepared, rewards = batch_gradient(world, objective, generator)
        gradients.append(gradient)
        gaps.append(_gap(prepared.advantage, rewards))
    rates = success_rate(world.logits.log_softmax(-1), world.critical)
    reward, own = _gradient(rates.sum(), world), _gradient((torch.stack(gaps).nanmean(0) * rates).sum(), world)
    with_reward = [_cosine(gradient, reward) for gradient in gradients]
    with_own = [_cosine(gradient, own) for gradient in gradients]
    return Alignment(mean(with_reward), mean(with_own), with_reward, with_own)


def _gap(advantage: Tensor, rewards: Tensor) -> Tensor:
    """Return the mean advantage of right responses less that of wrong ones, [Q]; NaN where there are none of one."""
    right, wrong = rewards, 1 - rewards
    return (advantage * right).sum(1) / right.sum(1) - (advantage * wrong).sum(1) / wrong.sum(1)


def _gradient(value: Tensor, world: World) -> Tensor:
    (found,) = torch.autograd.grad(value, world.logits, retain_graph=True)
    return found.flatten()


def _cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a, b, dim=0))


def below(ours: list[float], theirs: list[float]) -> bool:
    """Tell whether our cosines are lower by more than two standard errors of the difference, batch by batch."""
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    return mean(differences) < -2 * stdev(differences) / len(differences) ** 0.5


def all_objectives() -> dict[str, Objective]:
    """Return every method of the product with its defaults; a user's own has none."""
    make = TypeAdapter[Any](ObjectiveConfig).validate_python
    return {kind: make_objective(make({"kind": kind})) for kind in OBJECTIVES if kind != "user"}


def main(seed: int = 0) -> None:
    torch.set_num_threads(1)
    objectives = all_objectives()
    cells, missed = [], []
    for length, batches in BATCHES.items():
        for drift in DRIFTS:
            world = make_world(length, drift, seed)
            found = {kind: align(world, objective, batches, seed) for kind, objective in objectives.items()}
            cells.append({"length": length, "drift_nats": drift} | {k: a.figures() for k, a in found.items()})
            print(f"{length} tokens, drift {drift:g} nats")
            for kind, alignment in found.items():
                print(f"  {kind:14} ∇E[r] {alignment.with_reward:7.4f}  own {alignment.with_own:7.4f}", flush=True)
            for name in ("with_reward", "with_own"):
                ours, theirs = (getattr(found[kind], f"{name}_per_batch") for kind in ("quatro", "grpo"))
                if below(ours, theirs):
                    missed.append(f"{length} tokens, {drift:g} nats, {name}")
    print(json.dumps({"below_grpo": missed, "cells": cells}))
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    typer.run(main)
