"""Watches the Ray node of the controller: if it dies, no actor can start, and waits for one would not end."""

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
    """Return the result of `work`.

    Raises:
        ClusterError: the cluster considers this process's node dead; the work is cancelled.
    """
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
    """Raise ClusterError when the node dies. No deadline: Ray itself ends a process that has lost the head node."""
    while await asyncio.to_thread(own_node_lives):
        await asyncio.sleep(_LOOK_EVERY_S)
    raise ClusterError(
        "the Ray node of this process died (its raylet ended, or did not answer for too long); start Ray again, then "
        "rerun the same command with run.resume=auto to continue"
    )


def own_node_lives() -> bool:
    """Return whether the cluster considers this process's node alive; it notices a dead raylet after about 15 s.

    If the head node does not answer, nothing is known, and the node counts as alive.
    """
    own = ray.get_runtime_context().get_node_id()
    try:
        return any(node["NodeID"] == own and node["Alive"] for node in ray.nodes())
    except RpcError:
        return True
