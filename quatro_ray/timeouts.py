"""Deadlines for waiting, without the lost cancellations of asyncio.wait_for."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Coroutine
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")


async def within(deadline_s: float, work: Awaitable[T]) -> T:
    """Return the result of `work`. Raises TimeoutError after `deadline_s` seconds.

    This does not use asyncio.wait_for: in Python 3.11 that swallows a cancellation that arrives while the work ends, so
    the cancelled task would keep running.
    """
    async with asyncio.timeout(deadline_s):
        return await work


async def unless_raises(watch: Coroutine[Any, Any, NoReturn], work: Coroutine[Any, Any, T]) -> T:
    """Return the result of `work`. If `watch` raises first, cancel the work and raise that error."""
    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(watch)
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return await working
        return await watching
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


class Overtaken(Exception):
    """The event was set before the work was done; the work was cancelled."""


async def unless(event: asyncio.Event, work: Coroutine[Any, Any, T]) -> T:
    """Return the result of `work`. Raises Overtaken if the event is set first."""
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
