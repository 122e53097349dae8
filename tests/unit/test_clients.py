"""The async view of actors: deadlines, and where the next group goes."""

import asyncio
from typing import Any

import pytest

from quatro_ray.actors.clients import GeneratorPool, ReplayClient
from quatro_ray.errors import StallError


def test_a_silent_replay_buffer_ends_in_a_stall_error() -> None:
    class Silent:
        def __getattr__(self, name: str) -> Any:
            return self

        def remote(self, *args: Any) -> Any:
            return asyncio.get_running_loop().create_future()

    async def run() -> None:
        await ReplayClient(Silent(), 0.05).capacity(0)

    with pytest.raises(StallError, match=r"did not answer within replay.deadline_s=0.05 s"):
        asyncio.run(run())


def test_the_pool_fills_the_emptiest_engine_and_no_further_than_allowed() -> None:
    async def run() -> tuple[list[str], bool]:
        pool = GeneratorPool(["a", "b"], max_groups_in_flight=2)
        entered = [pool.slot() for _ in range(4)]
        got = [await s.__aenter__() for s in entered]
        fifth = asyncio.ensure_future(pool.slot().__aenter__())
        await asyncio.sleep(0.01)
        waited = not fifth.done()
        await entered[1].__aexit__(None, None, None)
        return [*got, await fifth], waited

    assert asyncio.run(run()) == (["a", "b", "a", "b", "b"], True)
