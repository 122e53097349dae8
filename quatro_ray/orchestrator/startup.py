"""Starts the parts of a run side by side, and says meanwhile what it waits for."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from threading import Event, Thread
from typing import Any

SAY_EVERY_S = 10.0
"""Longest silence of a start, in seconds."""


async def start_together(
    parts: Mapping[str, Coroutine[Any, Any, None]], say: Callable[[str], None], every_s: float = SAY_EVERY_S
) -> None:
    """Await all parts. If one fails, the others are cancelled and its error is raised.

    Args:
        parts: by the names under which they are shown.
        say: shows which parts are not ready, and at the end how long each took.
        every_s: seconds between two messages.
    """
    begun = said = time.monotonic()
    tasks = {asyncio.create_task(part): name for name, part in parts.items()}
    waiting, took = set(tasks), []
    try:
        while waiting:
            silence = max(0.0, said + every_s - time.monotonic())
            done, waiting = await asyncio.wait(waiting, timeout=silence, return_when=asyncio.FIRST_COMPLETED)
            now = time.monotonic()
            for task in done:
                task.result()
                took.append(f"{tasks[task]} {now - begun:.0f} s")
            if waiting and now - said >= every_s:
                names = ", ".join(name for task, name in tasks.items() if task in waiting)
                say(f"starting: waiting for {names} ({now - begun:.0f} s)")
                said = now
        say(f"started: {', '.join(took)}")
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@contextmanager
def waiting_for(what: str, say: Callable[[str], None], every_s: float = SAY_EVERY_S) -> Iterator[None]:
    """Say what the blocking call inside the with block waits for, every `every_s` seconds, from a thread."""
    begun, ended = time.monotonic(), Event()

    def loop() -> None:
        while not ended.wait(every_s):
            say(f"waiting for {what} ({time.monotonic() - begun:.0f} s)")

    thread = Thread(target=loop, name=f"waiting for {what}", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(timeout=every_s)  # `say` may hang on a terminal
