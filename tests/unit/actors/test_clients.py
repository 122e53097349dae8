"""The async view of actors: deadlines, and where the next group goes."""

import asyncio
from typing import Any

import pytest
import ray
from ray.exceptions import ActorDiedError, OutOfMemoryError

from quatro_ray.actors.fleet import Fleet
from quatro_ray.actors.generator_client import GeneratorClient
from quatro_ray.actors.interfaces import Engine
from quatro_ray.actors.replay_client import ReplayClient
from quatro_ray.config import GeneratorConfig
from quatro_ray.errors import StallError
from quatro_ray.evaluation.engine_pool import FixedPool, PoolLost
from quatro_ray.failures import EngineLost


def test_a_silent_replay_buffer_is_started_again_and_ends_in_a_stall_error(monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[bool] = []
    monkeypatch.setattr(ray, "kill", lambda actor, no_restart: killed.append(no_restart))

    class Silent:
        def __getattr__(self, name: str) -> Any:
            return self

        def remote(self, *args: Any) -> Any:
            return asyncio.get_running_loop().create_future()

    async def run() -> None:
        await ReplayClient(Silent(), 0.05).capacity(0)

    with pytest.raises(StallError, match=r"did not answer within replay.deadline_s=0.05 s in 3 tries"):
        asyncio.run(run())
    assert killed == [False] * 3


@pytest.mark.parametrize("death", [ActorDiedError(), OutOfMemoryError("killed by the memory monitor")])
def test_an_engine_whose_actor_is_gone_is_lost(death: Exception) -> None:
    class Gone:
        def __getattr__(self, name: str) -> Any:
            return self

        async def remote(self) -> Any:
            raise death

    with pytest.raises(EngineLost):
        asyncio.run(GeneratorClient(Gone()).load())


def test_the_fleet_fills_the_emptiest_engine_and_no_further_than_allowed() -> None:
    a, b = GeneratorClient("a"), GeneratorClient("b")

    async def run() -> tuple[list[Engine], bool]:
        config = GeneratorConfig(num_engines=2, max_groups_in_flight=2, max_prompt_tokens=1, max_response_tokens=1)
        pool = Fleet(lambda index: (a, b)[index], config, 60)
        pool.started(synced=True)
        entered = [pool.lend() for _ in range(4)]
        got = [await s.__aenter__() for s in entered]
        fifth = asyncio.ensure_future(pool.lend().__aenter__())
        await asyncio.sleep(0.01)
        waited = not fifth.done()
        await entered[1].__aexit__(None, None, None)
        return [*got, await fifth], waited

    assert asyncio.run(run()) == ([a, b, a, b, b], True)


def test_engines_that_wait_for_weights_get_no_work() -> None:
    a = GeneratorClient("a")

    async def run() -> bool:
        config = GeneratorConfig(num_engines=1, max_prompt_tokens=1, max_response_tokens=1)
        pool = Fleet(lambda index: a, config, 60)
        pool.started(synced=False)
        waiting = asyncio.ensure_future(pool.lend().__aenter__())
        await asyncio.sleep(0.01)
        waited = not waiting.done()
        await pool.synced(pool.slots[0])
        assert await waiting is a
        return waited

    assert asyncio.run(run())


def test_an_engine_of_a_fixed_pool_that_is_lost_ends_what_it_was_for() -> None:
    async def run() -> None:
        async with FixedPool([GeneratorClient("a")], 1).lend():
            raise EngineLost("out of memory")

    with pytest.raises(PoolLost, match="an evaluation engine was lost: out of memory"):
        asyncio.run(run())
