"""Engines in bfloat16 hold the bits of a learner in float32 after an update, and not before it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from quatro_ray.replay.buffer import LeasedBatch
from quatro_ray.replay.staleness import Lineage
from quatro_ray.types import Query, RolloutGroup, SamplingParams, Score
from quatro_ray.weight_sync.agreement import WeightComparison
from tests.make import config
from tests.real.conftest import Ring, start_ring


def compare_weights(ring: Ring, comparison: WeightComparison, *, at_least: int = 3) -> list[str]:
    """Return the names of the parameters that differ; `at_least` so many must be comparable."""
    held = ring.run(ring.generator.parameter_checksums())
    dtypes = {name: checksum.split()[0] for worker in held for name, checksum in worker.items()}
    expected = ring.run(ring.cluster.learner.parameter_checksums(dtypes))
    same = {name for worker in held for name, checksum in worker.items() if expected.get(name) == checksum}
    (wrong,) = comparison.wrong(expected, [held])
    assert len(same) + len(wrong) >= at_least
    return wrong


def sample(ring: Ring) -> tuple[RolloutGroup, ...]:
    async def one() -> RolloutGroup:
        query, sampling = Query("q", "1+1=", "2"), SamplingParams(1.0, 1.0, 8, 3)
        _, group = await ring.generator.generate(1, query, sampling, 4)
        return await group

    group = ring.run(one())
    return (replace(group, rollouts=tuple(replace(r, score=Score(i % 2)) for i, r in enumerate(group.rollouts))),)


def test_stale_weights_show_in_their_bits(local_ray: None, model_path: str, tmp_path: Path) -> None:
    settings = config(tmp_path, generator={"dtype": "bfloat16"}, weight_sync={"check_every_updates": 1})
    ring = start_ring(settings, model_path)
    ring.cluster.fleet.started(synced=True)
    comparison = WeightComparison()
    try:
        assert compare_weights(ring, comparison) == []
        for version in range(2):
            lineage = Lineage.unbroken(version)
            ring.run(ring.parts.learner.train_step(LeasedBatch(sample(ring), lineage), version))
            assert compare_weights(ring, comparison)
            ring.run(ring.parts.weight_sync.update(version + 1))
            assert compare_weights(ring, comparison) == []
    finally:
        ring.cluster.shutdown()
