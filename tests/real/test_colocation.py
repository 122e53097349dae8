"""An engine and a rank share a device: one bundle for both, the engine starts first, and they may take turns.

A CPU has no memory to free, but vLLM does the rest of sleeping: it freezes requests, discards their keys and values,
and computes them again. Weights travel over gloo.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.util.placement_group import placement_group_table

from quatro_ray.config import Config
from quatro_ray.data.dataset import QueryStream
from quatro_ray.data.registry import make_dataset
from quatro_ray.orchestrator.cluster import spawn
from quatro_ray.orchestrator.controller import Controller
from quatro_ray.orchestrator.placement import Placer
from quatro_ray.orchestrator.resources import SHARED_DEVICE, bundles
from quatro_ray.telemetry.console import Progress
from quatro_ray.telemetry.recorder import Recorder
from quatro_ray.types import Query, SamplingParams
from tests.make import config
from tests.real.conftest import Ring


def make_config(path: Path, mode: str, number: int) -> Config:
    return config(
        path,
        run={"num_steps": 6},
        cluster={"colocate": True, "colocate_mode": mode, "cpus_per_engine": 0.4, "cpus_per_rank": 0.3},
        generator={"num_engines": number, "max_response_tokens": 100, "max_groups_in_flight": 4},
        learner={"num_ranks": number, "tokens_per_micro_batch": 256},
        replay={"groups_per_step": 4, "group_size": 4, "max_staleness": 3},
    )


@pytest.fixture(params=[("overlapping", 1), ("alternating", 2)], ids=lambda param: param[0])
def ring(request: pytest.FixtureRequest, local_ray: None, model_path: str, tmp_path: Path) -> Any:
    made = make_config(tmp_path / "run", *request.param)
    made.run.dir.mkdir()
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        print(line)

    async def placed() -> Ring:
        place = await Placer.reserve(made, bundles(made), say)
        cluster = await spawn(place, model_path, say)
        return Ring(cluster, cluster.components(), made, asyncio.get_running_loop())

    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    ring = loop.run_until_complete(placed())
    yield ring, said
    ring.cluster.shutdown()
    asyncio.set_event_loop(None)


def test_a_run_of_engines_and_ranks_that_share_devices(ring: tuple[Ring, list[str]]) -> None:
    system, said = ring
    started = [line.removeprefix("started: ") for line in said if line.startswith("started: ")]
    assert len(started) == 2 and started[0].startswith("engines") and "learner" in started[1]
    places_are_shared(system)
    made = system.config
    dataset = make_dataset(made.data, made.rewards)
    recorder = Recorder(made.run.dir, num_steps=made.run.num_steps, progress=Progress())
    controller = Controller(made, system.parts, QueryStream(dataset, 0), dataset.held_out, recorder)
    counters = system.run(controller.run(), 300)
    recorder.close()
    assert counters.steps.learner_steps == made.run.num_steps
    metrics = [json.loads(line) for line in (made.run.dir / "metrics.jsonl").read_text().splitlines()]
    assert metrics[-1]["health/engines_lost"] == 0
    if made.alternates:  # whatever was under way was frozen, and its tokens are those of the policy all the same
        assert counters.steps.in_flight_updates > 0 and counters.multi_version_rollouts > 0
        frozen_requests_continue(system)


def places_are_shared(system: Ring) -> None:
    place = system.cluster.place
    groups = {role: place.group_of(role, 0) for role in ("generator", "learner", "replay")}
    assert groups["generator"] is groups["learner"] and groups["replay"] is not groups["learner"]
    reserved = placement_group_table(groups["learner"])["bundles"]
    shared = [b.resources for b in bundles(system.config) if b.role == SHARED_DEVICE]
    assert [reserved[i] for i in range(len(shared))] == shared


def frozen_requests_continue(system: Ring) -> None:
    """A greedy response with a sleep in it is the response without."""
    engine = system.generator
    query, greedy = Query("q", "12+34=", "46"), SamplingParams(0.0, 1.0, 100, seed=0)

    async def with_a_sleep() -> Any:
        answer = asyncio.ensure_future(engine.generate(1, query, greedy, 1))
        await engine.sleep()
        await asyncio.sleep(0.2)
        assert not answer.done()
        await engine.wake_up()
        return await answer

    _, whole = system.run(engine.generate(1, query, greedy, 1))
    _, interrupted = system.run(with_a_sleep())
    (expected,), (found,) = (ray.get(group).rollouts for group in (whole, interrupted))
    assert expected.token_ids.tolist() == found.token_ids.tolist()
