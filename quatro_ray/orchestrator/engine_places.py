"""Finds room for engines: for those beyond `num_engines`, and for each one again after its node is lost.

A run does not wait for them. An autoscaler sees what they ask for, and each joins when it finds room.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group

from quatro_ray.orchestrator.placement import Placer
from quatro_ray.orchestrator.resources import engine_bundle

_LOOK_EVERY_S = 2.0


class EnginePlaces:
    """Waits for the room of an engine.

    Args:
        place: has reserved the resources of the run; the room of further engines is added to it.
    """

    def __init__(self, place: Placer) -> None:
        self._place = place
        self._waiting: list[PlacementGroup] = []

    async def room(self, index: int) -> None:
        """Return once there is room for the engine with this index, for which `place` then has a bundle.

        There is no deadline: the run continues with the engines that it has, and without any the next weight update
        ends it.
        """
        if group := self._place.group_of("generator", index):  # its node may have gone
            await _first_ready([group])
            return
        config = self._place.config
        bundle = engine_bundle(config, index)
        if not self._waiting and index == config.generator.num_engines:
            num = config.generator.max_num_engines - index
            self._waiting = [placement_group([bundle.resources]) for _ in range(num)]
        ready = await _first_ready(self._waiting)
        self._waiting.remove(ready)
        self._place.add([bundle], ready)

    def release(self) -> None:
        """Give up the room that engines still wait for."""
        for group in self._waiting:
            remove_placement_group(group)


async def _first_ready(groups: Sequence[PlacementGroup]) -> PlacementGroup:
    while True:
        for group in groups:
            table = await asyncio.to_thread(placement_group_table, group)
            if table["state"] == "CREATED":
                return group
        await asyncio.sleep(_LOOK_EVERY_S)
