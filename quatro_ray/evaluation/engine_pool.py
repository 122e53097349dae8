"""A pool of evaluation engines that are not replaced when they are lost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from quatro_ray.actors.interfaces import Engine
from quatro_ray.errors import ClusterError
from quatro_ray.failures import EngineLost


class PoolLost(ClusterError):
    """An evaluation engine is gone, and with it the evaluation."""


class FixedPool:
    """The engines of one evaluation. A lost engine is not replaced; it ends the evaluation with PoolLost.

    Args:
        clients: one GeneratorClient for each engine.
        max_groups_in_flight: groups that an engine works on at the same time.
    """

    def __init__(self, clients: Sequence[Engine], max_groups_in_flight: int) -> None:
        self._clients = clients
        self._loads = [0] * len(clients)
        self._slots = asyncio.Semaphore(len(clients) * max_groups_in_flight)

    @asynccontextmanager
    async def lend(self) -> AsyncIterator[Engine]:
        """Lend the least loaded engine; waits while all have `max_groups_in_flight` groups."""
        async with self._slots:
            index = self._loads.index(min(self._loads))
            self._loads[index] += 1
            try:
                yield self._clients[index]
            except EngineLost as error:
                raise PoolLost(f"an evaluation engine was lost: {error}") from error
            finally:
                self._loads[index] -= 1
