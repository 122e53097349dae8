"""An engine of two devices receives each update whole: its log-probs are the learner's, version after version."""

from dataclasses import replace
from pathlib import Path

import pytest

from quatro_ray.config import TinyModelConfig
from quatro_ray.engines.tiny_model import make_model, save_pretrained
from quatro_ray.engines.tiny_tokenizer import make_tokenizer
from quatro_ray.replay.buffer import LeasedBatch
from quatro_ray.replay.staleness import Lineage
from quatro_ray.types import Query, RolloutGroup, SamplingParams, Score
from quatro_ray.weight_sync.agreement import WeightComparison
from tests.make import config
from tests.real.conftest import Ring, start_ring
from tests.real.ring.test_ring import disagreement
from tests.real.test_weight_checksums import compare_weights


def sample(ring: Ring) -> tuple[RolloutGroup, ...]:
    """One group, with rewards that differ."""

    async def one() -> RolloutGroup:
        generator = ring.generator
        _, group = await generator.generate(1, Query("q", "1+1=", "2"), SamplingParams(1.0, 1.0, 8, 3), 4)
        return await group

    group = ring.run(one())
    return (replace(group, rollouts=tuple(replace(r, score=Score(i % 2)) for i, r in enumerate(group.rollouts))),)


@pytest.mark.parametrize("kind", ["tensor", "pipeline", "data"])
def test_both_workers_follow_the_learner(local_ray: None, tmp_path: Path, kind: str) -> None:
    tokenizer = make_tokenizer()
    model = make_model(TinyModelConfig(kind="tiny", hidden_size=128, num_heads=4), tokenizer, 0)
    save_pretrained(model, tokenizer, tmp_path / "model")
    ring = start_ring(config(tmp_path, generator={f"{kind}_parallel_size": 2}), str(tmp_path / "model"))
    ring.cluster.fleet.started(synced=True)
    try:
        old = sample(ring)
        for version in range(2):
            groups = sample(ring)
            assert disagreement(ring, groups) < 1e-3
            ring.run(ring.parts.learner.train_step(LeasedBatch(groups, Lineage.unbroken(version)), version))
            ring.run(ring.parts.weight_sync.update(version + 1))
            assert compare_weights(ring, WeightComparison()) == []
        assert disagreement(ring, sample(ring)) < 1e-3
        assert disagreement(ring, old) > 1e-2
    finally:
        ring.cluster.shutdown()
