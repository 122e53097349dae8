"""The one running system that all tests of this folder share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.make import config
from tests.real.conftest import Ring, start_ring


@pytest.fixture(scope="package")
def ring(local_ray: None, model_path: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ring]:
    made = config(
        tmp_path_factory.mktemp("ring"),
        generator={"max_response_tokens": 200, "temperature": 0.8},
        learner={"tokens_per_micro_batch": 512, "reference_kl_coef": 0.1},
        verifier={"deadline_s": 20},
    )
    ring = start_ring(made, model_path)
    ring.cluster.fleet.started(synced=True)
    yield ring
    ring.cluster.shutdown()


@pytest.fixture(autouse=True)
def one_version(ring: Ring) -> None:
    """Give the engine the learner's weights, whatever the test before has left."""
    new = ring.run(ring.generator.policy_version()) + 1
    ring.run(ring.cluster.learner.set_version(new))
    ring.run(ring.parts.weight_sync.update(new))
