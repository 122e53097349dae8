"""Episodes on a real engine: turns under the weights of their time, deadlines that reach it, actors that die."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import ray

from quatro_ray.actors.environment import EnvironmentActor
from quatro_ray.actors.environment_pool import EnvironmentPool
from quatro_ray.actors.generation_retry import GroupRequest, generate_once
from quatro_ray.actors.generator_client import GeneratorClient
from quatro_ray.config import EnvironmentConfig
from quatro_ray.failures import GenerationFailed
from quatro_ray.types import DropReason, GenerationSummary, Query, RolloutGroup, SamplingParams
from tests.real.conftest import Ring
from tests.real.ring.test_ring import disagreement, sample, train, version

SAMPLING = SamplingParams(temperature=0.8, top_p=1.0, max_tokens=60, seed=3)
FUNCTIONS = """
import time
from pathlib import Path
from uuid import uuid4

def ask(query, policy, *, gate=None):
    vowels = 0
    while (turn := policy.generate(stop=list("aeiou"), max_tokens=12)) is not None:
        vowels += turn.text[-1:] in tuple("aeiou")
        if gate is not None:
            wait_at(Path(gate))
        policy.give(" and? ")
    return {"vowels": vowels}

def wait_at(gate):
    if not (gate / "open").exists():
        (gate / f"waits-{uuid4()}").touch()
    end = time.monotonic() + 100
    while not (gate / "open").exists():
        assert time.monotonic() < end
        time.sleep(0.05)

def long(query, policy):
    policy.generate()
"""


@pytest.fixture
def functions(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(FUNCTIONS)
    return tmp_path / "mine.py"


@pytest.fixture
def made_pools(ring: Ring) -> Iterator[list[EnvironmentPool]]:
    pools: list[EnvironmentPool] = []
    yield pools
    for actor in [a for pool in pools for a in pool.actors]:
        ray.get(actor.shutdown.remote(), timeout=30)
        ray.kill(actor)


@pytest.fixture
def client(ring: Ring, model_path: str, functions: Path, made_pools: list[EnvironmentPool]) -> Any:
    """Makes a client of the ring's engine whose source `mine` plays in the given function."""

    def make(name: str, **over: Any) -> GeneratorClient:
        tree = {"function": f"{functions}:{name}", "num_workers": 4, "max_turns": 3} | over
        config = EnvironmentConfig.model_validate(tree)

        def spawn() -> Any:
            made = EnvironmentActor.options(num_cpus=0, max_concurrency=100)  # type: ignore[attr-defined]  # Ray adds it
            return made.remote(config, model_path)

        made_pools.append(EnvironmentPool(spawn, config))
        return GeneratorClient(ring.cluster.generators()[0], {"mine": made_pools[-1]})

    return make


class Gate:
    """A folder at which episodes of `ask` wait after each turn until it is opened."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder

    async def reached(self, num_episodes: int, seconds: float = 60) -> None:
        async with asyncio.timeout(seconds):
            while len(list(self.folder.glob("waits-*"))) < num_episodes:
                await asyncio.sleep(0.05)

    def open(self) -> None:
        (self.folder / "open").touch()


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    return Gate(tmp_path / "gate")


async def play(client: GeneratorClient, group_id: int = 0) -> tuple[GenerationSummary, RolloutGroup]:
    query = Query(str(group_id), f"{10 + group_id}+34=", "44", source="mine")
    summary, group = await generate_once(client, GroupRequest(group_id, query, SAMPLING, 4), deadline_s=100)
    return summary, await cast(Awaitable[RolloutGroup], group)


def test_log_probs_over_several_turns_are_the_learners_own(ring: Ring, client: Any) -> None:
    """So the tokens that the engine continued are those that the learner sees, what was given included."""

    async def work() -> tuple[RolloutGroup, ...]:
        mine = client("ask")
        queries = [Query(str(i), f"{i}+3=", "4", source="mine") for i in range(2)]
        requests = [GroupRequest(i, query, SAMPLING, 4) for i, query in enumerate(queries)]
        refs = [await generate_once(mine, request, deadline_s=100) for request in requests]
        scored = [(await ring.parts.verifiers.score(group))[1] for _, group in refs]
        return tuple([await group for group in scored])

    groups = ring.run(work())
    rollouts = [r for g in groups for r in g.rollouts]
    assert all(r.num_turns == 3 and r.finish_reason == "length" and " and? " in r.transcript for r in rollouts)
    assert any(r.environment["vowels"] > 0 for r in rollouts)
    assert {int((~r.is_sampled()).sum()) for r in rollouts} == {2 * len(" and? ")}
    assert all(len({r.transcript for r in g.rollouts}) == 4 for g in groups)  # each has its own seed
    assert disagreement(ring, groups) < 1e-3
    metrics = train(ring, groups)
    assert metrics["tokens/trained"] == sum(r.num_sampled for r in rollouts)


def test_the_same_seed_gives_the_same_episodes(ring: Ring, client: Any) -> None:
    async def twice() -> tuple[RolloutGroup, RolloutGroup]:
        mine = client("ask")
        return (await play(mine))[1], (await play(mine))[1]

    first, second = ring.run(twice())
    assert [r.transcript for r in first.rollouts] == [r.transcript for r in second.rollouts]


def test_an_update_between_turns_shows_in_the_versions(ring: Ring, client: Any, gate: Gate) -> None:
    start = version(ring)
    train(ring, sample(ring))

    async def work() -> tuple[GenerationSummary, RolloutGroup]:
        playing = asyncio.create_task(play(client("ask", params={"gate": str(gate.folder)})))
        await gate.reached(num_episodes=4)
        await ring.parts.weight_sync.update(start + 1)
        gate.open()
        return await playing

    summary, group = ring.run(work())
    assert summary.multi_version_rollouts == 4
    for rollout in group.rollouts:
        versions = rollout.versions()[rollout.is_sampled()]
        assert versions[0] == start and versions[-1] == start + 1


def test_a_deadline_reaches_the_engine(ring: Ring, client: Any) -> None:
    async def work() -> None:
        mine = client("long", episode_deadline_s=0.1)
        with pytest.raises(GenerationFailed, match=r"missed episode_deadline_s=0\.1") as raised:
            query = Query("0", "1+1=", "2", source="mine")
            request = GroupRequest(0, query, SamplingParams(0.8, 1.0, 190, 0), 4)
            await generate_once(mine, request, deadline_s=60)
        assert raised.value.reason is DropReason.ENVIRONMENT_TIMEOUT
        deadline = time.monotonic() + 10
        while (await mine.load()).num_running:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.1)

    ring.run(work())


def test_an_actor_that_dies_is_replaced(ring: Ring, client: Any, made_pools: list[EnvironmentPool], gate: Gate) -> None:
    async def work() -> None:
        mine = client("ask", params={"gate": str(gate.folder)})
        playing = asyncio.create_task(play(mine))
        await gate.reached(num_episodes=1)
        ray.kill(made_pools[-1].actors[0])
        with pytest.raises(GenerationFailed) as raised:
            await playing
        assert raised.value.reason is DropReason.ENVIRONMENT_ERROR
        assert made_pools[-1].num_replaced == 1
        gate.open()
        assert len((await play(mine))[1].rollouts) == 4

    ring.run(work())
