"""What a cluster lacks, in words."""

from __future__ import annotations

import pytest

from quatro_ray.orchestrator.placement import missing

BIG, SMALL = {"CPU": 16.0, "GPU": 8.0, "memory": 1e9}, {"CPU": 4.0}


def both(*nodes: dict[str, float]) -> dict[str, float]:
    return {name: sum(node.get(name, 0.0) for node in nodes) for name in ("CPU", "GPU")}


@pytest.mark.parametrize(
    ("need", "nodes", "says"),
    [
        ([{"CPU": 1.0, "GPU": 4.0}] * 2, [BIG], ""),
        ([{"CPU": 0.1}] * 40, [SMALL], ""),  # 4.000000000000001 in floating point
        ([{"CPU": 1.0, "GPU": 4.0}] * 2, [SMALL], "the run needs 8 GPUs and the cluster has 0"),
        ([{"CPU": 1.0}] * 5, [SMALL], "the run needs 5 CPUs and the cluster has 4"),
        ([{"CPU": 5.0}], [SMALL, SMALL], "an actor needs 5 CPUs on one node, and no node has that"),
        ([{"CPU": 20.0, "GPU": 1.0}], [BIG, SMALL], "an actor needs 20 CPUs, 1 GPUs on one node, and no node has that"),
        ([{"CPU": 1.0}], [], "the run needs 1 CPUs and the cluster has 0"),
    ],
)
def test_the_first_thing_that_is_missing_is_named(
    need: list[dict[str, float]], nodes: list[dict[str, float]], says: str
) -> None:
    assert missing(need, both(*nodes), nodes) == says
