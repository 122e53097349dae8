"""Finds room for engines: for those beyond `num_engines`, and for each one again after its node is lost.

A run does not wait for them. An autoscaler sees what they ask for, and each joins when it finds room.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

from ray.exceptions import RpcError
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group

from quatro_ray.errors import last_line
from quatro_ray.orchestrator.placement import Placer
from quatro_ray.orchestrator.resources import engine_bundle

T = TypeVar("T")
_LOOK_EVERY_S = 2.0
_logger = logging.getLogger(__name__)


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

    async def give_back(self, index: int) -> None:
        """Give back the room of an engine that is given up, unless a learner rank shares it.

        An autoscaler may then remove the engine's node, or no longer looks for one.
        """
        if group := self._place.forget("generator", index):
            await _answered(partial(remove_placement_group, group))

    def release(self) -> None:
        """Give up the room that engines still wait for."""
        for group in self._waiting:
            remove_placement_group(group)


async def _first_ready(groups: Sequence[PlacementGroup]) -> PlacementGroup:
    while True:
        for group in groups:
            table = await _answered(partial(placement_group_table, group))
            if table.get("state") == "CREATED":  # an unknown group has no state
                return group
        await asyncio.sleep(_LOOK_EVERY_S)


async def _answered(ask: Callable[[], T]) -> T:
    """Return what the head node answers. If it does not answer for a moment, ask again: the run needs no answer."""
    is_noted = False
    while True:
        try:
            return await asyncio.to_thread(ask)
        except RpcError as error:
            if not is_noted:
                _logger.warning("the head node does not answer about the room of engines: %s", last_line(error))
            is_noted = True
        await asyncio.sleep(_LOOK_EVERY_S)
