"""What a start says while it waits, and what happens if a part fails."""

import asyncio
import re
import threading
import time

import pytest

from quatro_ray.orchestrator.startup import start_together, waiting_for


def test_parts_start_side_by_side_and_are_named_while_they_are_waited_for() -> None:
    said: list[str] = []
    ready = asyncio.Event()

    async def quick() -> None:
        ready.set()

    async def slow() -> None:
        await ready.wait()
        while not said:
            await asyncio.sleep(0.01)

    asyncio.run(start_together({"engines": slow(), "learner": quick()}, said.append, every_s=0.05))
    assert re.fullmatch(r"starting: waiting for engines \(\d+ s\)", said[0])
    assert re.fullmatch(r"started: learner \d+ s, engines \d+ s", said[-1])


def test_the_first_failure_cancels_the_other_parts() -> None:
    cancelled = []

    async def fails() -> None:
        raise ValueError("no such model")

    async def waits() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    with pytest.raises(ValueError, match="no such model"):
        asyncio.run(start_together({"engines": waits(), "learner": fails()}, print))
    assert cancelled


def test_a_cancelled_start_leaves_no_part_behind() -> None:
    async def cancel() -> set[asyncio.Task[None]]:
        start = asyncio.create_task(start_together({"engines": asyncio.sleep(60)}, print))
        await asyncio.sleep(0)
        start.cancel()
        await asyncio.gather(start, return_exceptions=True)
        return asyncio.all_tasks() - {asyncio.current_task()}

    assert asyncio.run(cancel()) == set()


def test_a_blocking_call_says_what_it_waits_for() -> None:
    said: list[str] = []
    with waiting_for("Ray", said.append, every_s=0.02):
        while not said:
            time.sleep(0.01)
    assert re.fullmatch(r"waiting for Ray \(\d+ s\)", said[0])
    while any(thread.name == "waiting for Ray" for thread in threading.enumerate()):
        time.sleep(0.01)
    number = len(said)
    time.sleep(0.1)
    assert len(said) == number
