"""The exact gradients that batches are compared with."""

from __future__ import annotations

import torch

from benchmarks.alignment import align, all_objectives, below, make_world, penalty


def test_the_penalty_has_the_stabiliser_as_its_gradient() -> None:
    """At one state, d penalty/dπ is max(π, β) log(π/β) for each token."""
    behavior = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    policy = torch.tensor([0.2, 0.7, 0.1], dtype=torch.float64, requires_grad=True)
    # the first row of a table is that of the start; one position has one visited state
    tables = [p.expand(1, 1, 3, 3).log() for p in (policy, behavior)]
    (got,) = torch.autograd.grad(penalty(*tables).sum(), policy)
    torch.testing.assert_close(got, torch.maximum(policy, behavior).detach() * (policy / behavior).detach().log())


def test_quatro_is_above_grpo_where_its_radius_is_reached() -> None:
    world = make_world(5, 3.0, seed=0)
    quatro, grpo = (align(world, all_objectives()[kind], 8, seed=0) for kind in ("quatro", "grpo"))
    assert not below(quatro.with_own_per_batch, grpo.with_own_per_batch)
    assert below(grpo.with_own_per_batch, quatro.with_own_per_batch)
