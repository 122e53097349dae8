"""Waiting that ends."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


async def within(deadline_s: float, work: Awaitable[T]) -> T:
    """`work`, or TimeoutError after `deadline_s`.

    Not asyncio.wait_for: in Python 3.11 that swallows a cancellation that arrives as the work ends, and whoever was
    to be stopped goes on.
    """
    async with asyncio.timeout(deadline_s):
        return await work


class Overtaken(Exception):
    """What was waited for meanwhile came first; the work was cancelled."""


async def unless(event: asyncio.Event, work: Coroutine[Any, Any, T]) -> T:
    """`work`, or Overtaken where the event is set first."""
    scope = asyncio.timeout(None)

    async def end_the_work() -> None:
        await event.wait()
        scope.reschedule(asyncio.get_running_loop().time())

    watching = asyncio.ensure_future(end_the_work())
    try:
        async with scope:
            return await work
    except TimeoutError as error:
        if scope.expired():
            raise Overtaken from error
        raise
    finally:
        watching.cancel()
