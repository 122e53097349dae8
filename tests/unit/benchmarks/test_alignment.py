"""The exact gradients that batches are compared with."""

from __future__ import annotations

from benchmarks.alignment import align, all_objectives, below, make_world


def test_quatro_is_above_grpo_far_from_its_samples() -> None:
    world = make_world(300, 12.0, seed=0)
    quatro, grpo = (align(world, all_objectives()[kind], 4, seed=0) for kind in ("quatro", "grpo"))
    assert below(grpo.with_reward_per_batch, quatro.with_reward_per_batch)
    assert below(grpo.with_own_per_batch, quatro.with_own_per_batch)
