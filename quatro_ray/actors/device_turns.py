"""Lets engines and learner use the memory of the same devices in turn (`cluster.colocate_mode=alternating`)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Literal

from quatro_ray.actors.fleet import EngineSlot, Fleet
from quatro_ray.actors.restart_policy import Health
from quatro_ray.errors import last_line
from quatro_ray.failures import EngineLost
from quatro_ray.timeouts import within


class DeviceTurns:
    """Gives the devices to the learner for a while, and then back to the engines.

    Args:
        fleet: the engines, each on a device that it shares with a rank.
        device_lock: the one that `fleet` holds while an engine starts, so that none starts in the learner's turn.
        deadline_s: seconds within which an engine must free its device, and take it back.
    """

    def __init__(self, fleet: Fleet, device_lock: asyncio.Lock, deadline_s: float) -> None:
        self._fleet = fleet
        self._device_lock = device_lock
        self._deadline_s = deadline_s

    @asynccontextmanager
    async def of_learner(self) -> AsyncIterator[None]:
        """Keep all engines asleep inside the `async with`. Their running requests continue afterwards.

        An engine that does not fall asleep or wake up in time is lost.
        """
        async with self._device_lock:
            slots = self._fleet.to_sync()
            for slot in slots:
                slot.update_begins()
            try:
                await self._each(slots, "sleep")
                yield
            finally:
                await self._each([slot for slot in slots if slot.record.state is not Health.DEAD], "wake_up")
                for slot in slots:
                    slot.update_ends()

    async def _each(self, slots: Sequence[EngineSlot], method: Literal["sleep", "wake_up"]) -> None:
        async def ask(slot: EngineSlot) -> None:
            try:
                await within(self._deadline_s, getattr(slot.client, method)())
            except TimeoutError:
                self._fleet.lost(slot, f"{method} missed generator.sleep_deadline_s={self._deadline_s:g} s")
            except EngineLost as error:
                self._fleet.lost(slot, f"{method}: {error}", core_died=error.core_died)
            except Exception as error:  # whatever it was, the event has it, and the engine starts again
                self._fleet.lost(slot, f"{method} failed: {last_line(error)}")

        await asyncio.gather(*map(ask, slots))
