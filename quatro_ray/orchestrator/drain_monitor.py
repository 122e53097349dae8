"""Reacts to Ray's notice that a node is going away, as before a preemption or when an autoscaler removes it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from typing import NoReturn

from quatro_ray.actors.fleet import Fleet
from quatro_ray.failures import LearnerLost
from quatro_ray.orchestrator.checkpoint_writer import CheckpointWriter
from quatro_ray.telemetry.recorder import Recorder
from quatro_ray.timeouts import unless_raises

LOOK_EVERY_S = 2.0

DrainNotice = Callable[[], Awaitable[Mapping[str, Sequence[int]] | None]]
"""Returns the nodes that are going away, by id, each with the indices of the engines on it; None if it is not known."""


class DrainMonitor:
    """Gives no new groups to the engines of a node that is going away, and writes a checkpoint before it goes."""

    def __init__(self, notice: DrainNotice, generators: Fleet, writer: CheckpointWriter, recorder: Recorder) -> None:
        self._notice = notice
        self._generators = generators
        self._writer = writer
        self._recorder = recorder
        self._is_checkpoint_due = asyncio.Event()
        self._known: set[str] = set()

    async def loop(self) -> None:
        """Look for notices every two seconds, also while a checkpoint is written. An error of either ends both."""
        await unless_raises(self._write_when_due(), self._look())

    async def _look(self) -> None:
        while True:
            nodes = await self._notice()
            if nodes is not None:
                self._heed(nodes)
            await asyncio.sleep(LOOK_EVERY_S)

    def _heed(self, nodes: Mapping[str, Sequence[int]]) -> None:
        self._generators.drain({index for engines in nodes.values() for index in engines})
        new = nodes.keys() - self._known
        for node in sorted(new):
            self._recorder.event("draining", f"node {node}", engines=list(nodes[node]))
        if new:
            self._is_checkpoint_due.set()
        self._known = set(nodes)

    async def _write_when_due(self) -> NoReturn:
        """Write one checkpoint at a time.

        Notices that arrive during a write are followed by one more: the learner may have made steps since. If it has
        not, the writer has nothing to do.
        """
        while True:
            await self._is_checkpoint_due.wait()
            self._is_checkpoint_due.clear()
            with suppress(LearnerLost):  # the learner's monitor reports it
                await self._writer.write(is_early=True)
