"""The node that the controller is on: without it nothing new starts, and waits for what cannot come."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

import ray
from ray.exceptions import RpcError

from quatro_ray.errors import ClusterError

T = TypeVar("T")
_LOOK_EVERY_S = 2.0


async def while_node_lives(work: Coroutine[Any, Any, T]) -> T:
    """Cancels the work and raises ClusterError when the cluster takes this process's node for dead."""
    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(_node_died())
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return await working
        return await watching
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _node_died() -> Any:
    """Ray itself ends a process that finds no head any more, so that this wait needs no deadline."""
    while await asyncio.to_thread(own_node_lives):
        await asyncio.sleep(_LOOK_EVERY_S)
    raise ClusterError(
        "the Ray node of this process died (its raylet ended, or did not answer for too long); start Ray again, and "
        "with run.resume=auto the same command goes on"
    )


def own_node_lives() -> bool:
    """As far as the cluster knows; a raylet that is gone is noticed after some 15 s. A head that does not answer says
    nothing about it."""
    own = ray.get_runtime_context().get_node_id()
    try:
        return any(node["NodeID"] == own and node["Alive"] for node in ray.nodes())
    except RpcError:
        return True
