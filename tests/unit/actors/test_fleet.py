"""Which engine a group gets; tests/unit/orchestrator/ has what happens when engines are lost."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import Any, cast

from quatro_ray.actors.fleet import Fleet
from quatro_ray.config import GeneratorConfig
from quatro_ray.types import EngineLoad


class Engine:
    def __init__(self, index: int) -> None:
        self.index = index
        self.kv_cache_usage = 0.0

    async def load(self) -> EngineLoad:
        return EngineLoad(0, 0, 0, is_alive=True, kv_cache_usage=self.kv_cache_usage)


async def lend(fleet: Fleet, stack: AsyncExitStack) -> int:
    """Index of the engine that a group gets."""
    engine = await asyncio.wait_for(stack.enter_async_context(fleet.lend()), 60)
    return cast(Engine, engine).index


async def fill() -> list[int]:
    config = GeneratorConfig(num_engines=2, max_groups_in_flight=4, max_prompt_tokens=1, max_response_tokens=1)
    engines: list[Any] = [Engine(0), Engine(1)]
    fleet = Fleet(lambda index: engines[index], config, liveness_deadline_s=5.0)
    fleet.started(synced=True)
    engines[0].kv_cache_usage = 0.95
    async with asyncio.TaskGroup() as tasks, AsyncExitStack() as stack:
        fleet.supervise(tasks, None)  # type: ignore[arg-type]
        while fleet.slots[0].kv_cache_usage == 0.0:
            await asyncio.sleep(0.01)
        got = [await lend(fleet, stack) for _ in range(5)]
        sixth = asyncio.ensure_future(lend(fleet, stack))
        await asyncio.sleep(0.05)
        assert not sixth.done()
        engines[0].kv_cache_usage = 0.3
        got.append(await sixth)
        fleet.close()
    return got


def test_a_full_cache_gets_no_further_group_until_it_has_room() -> None:
    """The first group goes to it all the same: an engine without work makes no report."""
    assert asyncio.run(fill()) == [0, 1, 1, 1, 1, 0]


class Counting(Fleet):
    looks = 0

    def _least_loaded(self) -> Any:
        self.looks += 1
        return super()._least_loaded()


async def pass_through(num_groups: int) -> tuple[int, int]:
    """Return how often a group looked for room, and the most that were in engines at one time."""
    config = GeneratorConfig(num_engines=2, max_groups_in_flight=2, max_prompt_tokens=1, max_response_tokens=1)
    engines: list[Any] = [Engine(0), Engine(1)]
    fleet = Counting(lambda index: engines[index], config, liveness_deadline_s=5.0)
    fleet.started(synced=True)
    inside, most = 0, 0

    async def one() -> None:
        nonlocal inside, most
        async with fleet.lend():
            inside += 1
            most = max(most, inside)
            await asyncio.sleep(0)
            inside -= 1

    async with asyncio.timeout(10):
        await asyncio.gather(*(one() for _ in range(num_groups)))
    return fleet.looks, most


def test_a_place_that_becomes_free_wakes_one_group() -> None:
    """And not each of those that wait, which would look again in vain."""
    looks, most = asyncio.run(pass_through(200))
    assert most == 4
    assert looks <= 4 * 200


async def cancelled_when_woken() -> None:
    config = GeneratorConfig(num_engines=1, max_groups_in_flight=1, max_prompt_tokens=1, max_response_tokens=1)
    fleet = Fleet(lambda index: cast(Any, Engine(index)), config, liveness_deadline_s=5.0)
    fleet.started(synced=True)

    async def one() -> None:
        async with fleet.lend():
            pass

    async with asyncio.TaskGroup() as tasks:
        fleet.supervise(tasks, None)  # type: ignore[arg-type]
        async with fleet.lend():
            first, second = (asyncio.ensure_future(one()) for _ in range(2))
            await asyncio.sleep(0.01)
        first.cancel()  # it was woken a moment ago
        await asyncio.wait_for(second, 60)
        assert first.cancelled()
        fleet.close()


def test_a_group_that_is_cancelled_when_it_is_woken_leaves_its_place_to_another() -> None:
    asyncio.run(cancelled_when_woken())
