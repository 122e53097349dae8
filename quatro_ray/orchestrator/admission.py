"""Starts groups while the staleness rule allows more of them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager

from quatro_ray.actors.interfaces import Replay
from quatro_ray.data.dataset import QueryStream
from quatro_ray.orchestrator.group_runner import GroupRunner
from quatro_ray.orchestrator.position import Position
from quatro_ray.types import Query


class Admission:
    """Owns the groups that are being generated or scored.

    Args:
        on_ready: called when a group becomes ready.
    """

    def __init__(
        self,
        replay: Replay,
        runner: GroupRunner,
        queries: QueryStream,
        position: Position,
        on_ready: Callable[[], None],
    ) -> None:
        self._replay = replay
        self._runner = runner
        self._queries = queries
        self._position = position
        self._on_ready = on_ready
        self._next_id = 1
        self._idle: deque[tuple[int, Query]] = deque()  # pending groups that no task works on
        self._active: dict[int, asyncio.Task[None]] = {}  # tasks by group id
        self._lock = asyncio.Lock()
        self._capacity_changed = asyncio.Event()

    async def loop(self, tasks: asyncio.TaskGroup) -> None:
        """Consume pending groups, then queries. Waits for capacity; unblocked by a new version or by a drop."""
        while True:
            self._capacity_changed.clear()
            async with self._lock:
                capacity = await self._replay.capacity(self._position.version, len(self._idle))
                started = [self._idle.popleft() for _ in range(min(capacity, len(self._idle)))]
                started += await self._admit(capacity - len(started))
                for group_id, query in started:
                    self._active[group_id] = tasks.create_task(self._run(group_id, query))
            await self._capacity_changed.wait()  # without a deadline: the learner's wait has one

    def capacity_changed(self) -> None:
        """Wake the loop: the buffer may have room for more groups."""
        self._capacity_changed.set()

    def restore(self, next_id: int, num_admitted: Mapping[str, int]) -> None:
        """Continue after the group ids and queries of an earlier run.

        Args:
            next_id: id of the next group.
            num_admitted: number of groups admitted so far, by source.
        """
        self._next_id = next_id
        self._queries.restore({**self._queries.state(), **num_admitted})

    @asynccontextmanager
    async def suspended(self) -> AsyncIterator[None]:
        """Cancel all groups in progress and admit none inside the `async with`; then start the pending groups."""
        async with self._lock:
            await _cancelled(self.tasks())
            yield
            self._idle = deque(await self._replay.pending())

    def tasks(self) -> list[asyncio.Task[None]]:
        """Return the tasks of the groups in progress."""
        return list(self._active.values())

    async def _admit(self, count: int) -> list[tuple[int, Query]]:
        if not count:
            return []
        queries = [next(self._queries) for _ in range(count)]
        group_ids = await self._replay.admit(self._next_id, queries, self._position.version)
        self._next_id += count
        return list(zip(group_ids, queries, strict=True))

    async def _run(self, group_id: int, query: Query) -> None:
        """Run one group; a dropped one makes room for another."""
        try:
            reason = await self._runner.run(group_id, query)
        finally:
            del self._active[group_id]
        if reason is None:
            self._on_ready()
        else:
            self.capacity_changed()


async def _cancelled(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
