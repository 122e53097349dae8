"""max_staleness 0 is synchronous training: the whole asynchronous system and a plain loop give the same bits."""

import asyncio
import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

import ray

from quatro_ray.config import Config
from quatro_ray.data.dataset import QueryStream
from quatro_ray.data.registry import make_dataset
from quatro_ray.orchestrator.controller import Controller
from quatro_ray.replay.buffer import LeasedBatch
from quatro_ray.replay.staleness import Lineage
from quatro_ray.telemetry.console import Progress
from quatro_ray.telemetry.recorder import Recorder
from quatro_ray.types import SamplingParams
from tests.make import config
from tests.real.conftest import Ring, start_ring

SAME = ("reward/mean", "policy_gradient/loss", "policy/entropy", "step/grad_norm", "tokens/trained")


def make_config(path: Path) -> Config:
    return config(
        path,
        generator={"deterministic": True},
        replay={"groups_per_step": 3, "group_size": 4, "max_staleness": 0},
        run={"num_steps": 3},
        data={
            "train": {"sums": {"kind": "chain_sum", "max_digits": 1, "num_questions": 92}},
            "eval": {"sums": {"kind": "chain_sum", "max_digits": 1, "num_questions": 8, "seed": 1}},
        },
    )


def checksums(ring: Ring) -> dict[str, str]:
    """The engine's weights, one SHA-256 for each tensor."""
    found: dict[str, str] = ray.get(ring.cluster.generators()[0].weight_checksums.remote(), timeout=60)
    return found


def back_to_the_start(ring: Ring, checkpoint: Path) -> None:
    """Learner and engine hold the starting policy again, under its number."""
    ring.run(ring.parts.learner.load_checkpoint(checkpoint, 0))
    ring.run(ring.parts.weight_sync.update(0))


def plain_loop(ring: Ring, made: Config) -> list[dict[str, Any]]:
    """Generate a batch, score it, train on it, update the weights; again."""
    queries = QueryStream(make_dataset(made.data, made.rewards), made.run.seed)
    group_ids = itertools.count(1)

    async def one(group_id: int, query: Any) -> Any:
        digest = hashlib.sha256(f"{made.run.seed}/train/{group_id}".encode()).digest()
        sampling = SamplingParams(1.0, 1.0, 8, seed=int.from_bytes(digest[:4], "big") >> 1)
        _, group = await ring.generator.generate(group_id, query, sampling, 4)
        _, scored = await ring.parts.verifiers.score(group)
        return await scored

    async def loop() -> list[dict[str, Any]]:
        history = []
        for step in range(made.run.num_steps):
            batch = [(next(group_ids), next(queries)) for _ in range(3)]
            groups = tuple([await one(i, q) for i, q in batch])
            history.append(await ring.parts.learner.train_step(LeasedBatch(groups, Lineage.unbroken(step)), step))
            await ring.parts.weight_sync.update(step + 1)
        return history

    return ring.run(loop(), 300)


def test_same_numbers_as_a_plain_synchronous_loop(local_ray: None, warm_model_path: str, tmp_path: Path) -> None:
    made = make_config(tmp_path / "controller")
    ring = start_ring(made, warm_model_path)
    checkpoint = tmp_path / "start"
    checkpoint.mkdir()
    ring.run(ring.parts.learner.save_checkpoint(checkpoint, 60))
    dataset = make_dataset(made.data, made.rewards)
    recorder = Recorder(made.run.dir, num_steps=3, progress=Progress())
    controller = Controller(made, ring.parts, QueryStream(dataset, made.run.seed), dataset.held_out, recorder)
    counters = ring.run(controller.run(), 300)
    recorder.close()
    asynchronous = [json.loads(line) for line in (made.run.dir / "metrics.jsonl").read_text().splitlines()]
    weights = checksums(ring)

    back_to_the_start(ring, checkpoint)
    assert checksums(ring) != weights
    synchronous = plain_loop(ring, made)
    assert checksums(ring) == weights
    ring.cluster.shutdown()
    assert [[m[k] for k in SAME] for m in asynchronous] == [[m[k] for k in SAME] for m in synchronous]
    assert set(counters.steps.staleness_tokens) == {0}
    assert counters.steps.learner_steps == 3
    assert counters.steps.in_flight_updates == 0
    assert sum(m["step/grad_norm"] > 0 for m in synchronous) > 0  # something was learned, so equality says something
    asyncio.set_event_loop(None)
