"""A real ring for the tests: Ray, a vLLM engine, two ZeRO-3 ranks, verifiers, the replay actor.

Tests that only need a running system share the one of tests/real/ring; the others start what they need.
"""

from __future__ import annotations

import asyncio
import fcntl
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import ray

from quatro_ray.actors.generator_client import GeneratorClient
from quatro_ray.config import Config, TinyModelConfig
from quatro_ray.data.registry import make_dataset
from quatro_ray.engines.tiny_model import make_model, save_pretrained
from quatro_ray.engines.tiny_tokenizer import make_tokenizer
from quatro_ray.engines.tiny_warmup import warm_up
from quatro_ray.orchestrator.cluster import Cluster, spawn
from quatro_ray.orchestrator.components import Components
from quatro_ray.orchestrator.connection import connect
from quatro_ray.orchestrator.placement import Placer
from quatro_ray.orchestrator.resources import bundles
from tests.make import config


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model with random weights."""
    path = tmp_path_factory.mktemp("model")
    tokenizer = make_tokenizer()
    save_pretrained(make_model(TinyModelConfig(kind="tiny"), tokenizer, seed=1), tokenizer, path)
    return str(path)


@pytest.fixture(scope="session")
def warm_model_path(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> str:
    """One that solves some one-digit sums; made once for both workers."""
    own = tmp_path_factory.getbasetemp()
    path = (own if worker_id == "master" else own.parent) / "warm_model"
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            warm_model(tmp_path_factory.mktemp("warm")).rename(path)
    return str(path)


def warm_model(path: Path) -> Path:
    made = config(
        model={"kind": "tiny", "warmup": {"max_steps": 200, "target_pass_rate": 0.5}},
        data={
            "train": {"sums": {"kind": "chain_sum", "max_digits": 1, "num_questions": 100}},
            "eval": {"sums": {"kind": "chain_sum", "max_digits": 1, "num_questions": 8, "seed": 1}},
        },
    )
    assert isinstance(made.model, TinyModelConfig)
    train = make_dataset(made.data, made.rewards).train["sums"]
    for line in warm_up(made.model, train, train[:64], 0, path):
        print(line)
    return path


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    connect(config())
    yield
    ray.shutdown()


@dataclass
class Ring:
    cluster: Cluster
    parts: Components
    config: Config
    loop: asyncio.AbstractEventLoop

    def run(self, work: Any, seconds: float = 120) -> Any:
        return self.loop.run_until_complete(asyncio.wait_for(work, seconds))

    def on_ranks(self, method: str, *args: Any) -> list[Any]:
        return ray.get([getattr(a, method).remote(*args) for a in self.cluster.learner.actors], timeout=120)

    @property
    def generators(self) -> list[GeneratorClient]:
        return [cast(GeneratorClient, slot.client) for slot in self.cluster.fleet.slots]

    @property
    def generator(self) -> GeneratorClient:
        """Of the first engine."""
        return self.generators[0]


async def placed(config: Config, model_path: str) -> Cluster:
    return await spawn(await Placer.reserve(config, bundles(config), print), model_path, print)


def start_ring(config: Config, model_path: str) -> Ring:
    config.run.dir.mkdir(parents=True, exist_ok=True)
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    cluster = loop.run_until_complete(placed(config, model_path))
    return Ring(cluster, cluster.components(), config, loop)
