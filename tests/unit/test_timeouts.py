"""Waits end, and cancellations are not lost."""

import asyncio

import pytest

from quatro_ray.timeouts import Overtaken, unless, within


def test_work_that_takes_too_long() -> None:
    with pytest.raises(TimeoutError):
        asyncio.run(within(0.01, asyncio.sleep(60)))
    assert asyncio.run(within(60, asyncio.sleep(0, "done"))) == "done"


def test_a_cancellation_that_comes_as_the_work_ends_is_not_lost() -> None:
    async def run() -> None:
        ready = asyncio.Event()
        task = asyncio.create_task(within(60, ready.wait()))
        await asyncio.sleep(0)
        ready.set()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())


def test_what_comes_first_ends_the_work() -> None:
    ended: list[str] = []

    async def work(seconds: float) -> str:
        try:
            await asyncio.sleep(seconds)
            return "done"
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise

    async def run() -> None:
        event = asyncio.Event()
        assert await unless(event, work(0)) == "done"
        asyncio.get_running_loop().call_later(0.05, event.set)
        with pytest.raises(Overtaken):
            await unless(event, work(60))
        assert ended == ["cancelled"]

        async def late() -> None:
            raise TimeoutError("its own")

        with pytest.raises(TimeoutError, match="its own"):
            await unless(asyncio.Event(), late())

    asyncio.run(run())
