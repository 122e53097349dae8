"""Engines of one evaluation, which nobody replaces."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from quatro_ray.errors import ClusterError
from quatro_ray.failures import EngineLost


class PoolLost(ClusterError):
    """An engine that nobody replaces is gone."""


class FixedPool:
    """Engines that nobody replaces: those of one evaluation. One that is lost ends it, as PoolLost."""

    def __init__(self, clients: list[Any], max_groups_in_flight: int) -> None:
        self._clients = clients
        self._loads = [0] * len(clients)
        self._slots = asyncio.Semaphore(len(clients) * max_groups_in_flight)

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[Any]:
        async with self._slots:
            index = self._loads.index(min(self._loads))
            self._loads[index] += 1
            try:
                yield self._clients[index]
            except EngineLost as error:
                raise PoolLost(f"an evaluation engine was lost: {error}") from error
            finally:
                self._loads[index] -= 1
