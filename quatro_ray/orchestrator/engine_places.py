"""Finds places for engines: `num_engines` are in the placement group of the run, each further one in its own.

A run does not wait for the further ones. An autoscaler sees what they ask for, and each joins when it finds room.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group

from quatro_ray.orchestrator.placement import Placer
from quatro_ray.orchestrator.resources import engine_bundle

_LOOK_EVERY_S = 2.0


class EnginePlaces:
    """Finds room for engines beyond `generator.num_engines`, and room again after a node is lost.

    Args:
        place: has reserved the resources of the run.
    """

    def __init__(self, place: Placer) -> None:
        self._place = place
        self._num_fixed = place.config.generator.num_engines
        self._waiting: list[PlacementGroup] = []
        self._placers: dict[int, Placer] = {}

    def placer(self, index: int) -> Placer:
        """Return what places the engine with this index; for further engines only after `room`."""
        return self._place if index < self._num_fixed else self._placers[index]

    async def room(self, index: int) -> None:
        """Return once there is room for the engine with this index. The first `num_engines` always have it.

        There is no deadline: without further engines the run continues as it is.
        """
        if index < self._num_fixed:
            return
        if index in self._placers:  # its node may have gone
            await _first_ready([self._placers[index].placement])
            return
        config = self._place.config
        if not self._placers and not self._waiting:
            bundle = engine_bundle(config, index)
            num = config.generator.max_num_engines - self._num_fixed
            self._waiting = [placement_group([bundle.resources]) for _ in range(num)]
        ready = await _first_ready(self._waiting)
        self._waiting.remove(ready)
        self._placers[index] = Placer(config, [engine_bundle(config, index)], ready)

    def release(self) -> None:
        """Give the room of all further engines back."""
        for placement in [*self._waiting, *(placer.placement for placer in self._placers.values())]:
            remove_placement_group(placement)


async def _first_ready(placements: Sequence[PlacementGroup]) -> PlacementGroup:
    while True:
        for placement in placements:
            table = await asyncio.to_thread(placement_group_table, placement)
            if table["state"] == "CREATED":
                return placement
        await asyncio.sleep(_LOOK_EVERY_S)
