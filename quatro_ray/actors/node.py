"""Watches the Ray node of the controller: if it dies, no actor can start, and waits for one would not end."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any, NoReturn, TypeVar

import ray
from ray.actor import ActorHandle
from ray.exceptions import RpcError

from quatro_ray.errors import ClusterError
from quatro_ray.timeouts import unless_raises

T = TypeVar("T")
_LOOK_EVERY_S = 2.0


async def while_node_lives(work: Coroutine[Any, Any, T]) -> T:
    """Return the result of `work`.

    Raises:
        ClusterError: the cluster considers this process's node dead; the work is cancelled.
    """
    return await unless_raises(_node_died(), work)


async def _node_died() -> NoReturn:
    """Raise ClusterError when the node dies. No deadline: Ray itself ends a process that has lost the head node."""
    while await asyncio.to_thread(own_node_lives):
        await asyncio.sleep(_LOOK_EVERY_S)
    raise ClusterError(
        "the Ray node of this process died (its raylet ended, or did not answer for too long); start Ray again, then "
        "rerun the same command with run.resume=auto to continue"
    )


async def draining_nodes(actors: Sequence[ActorHandle]) -> dict[str, list[int]] | None:
    """Return the ids of the nodes that Ray is told to drain, each with the positions of the actors that live there.

    None stands for a moment in which the head node does not answer, so that nothing is known.
    """
    return await asyncio.to_thread(_draining_nodes, actors)


def _draining_nodes(actors: Sequence[ActorHandle]) -> dict[str, list[int]] | None:
    try:
        nodes: dict[str, list[int]] = {node: [] for node in ray._private.state.state.get_draining_nodes()}
        if nodes:
            for position, actor in enumerate(actors):
                where = ray._private.state.actors(actor._actor_id.hex()).get("Address", {}).get("NodeID")
                if where in nodes:
                    nodes[where].append(position)
    except RpcError:
        return None
    return nodes


def own_node_lives() -> bool:
    """Return whether the cluster considers this process's node alive; it notices a dead raylet after about 15 s.

    If the head node does not answer, nothing is known, and the node counts as alive.
    """
    own = ray.get_runtime_context().get_node_id()
    try:
        return any(node["NodeID"] == own and node["Alive"] for node in ray.nodes())
    except RpcError:
        return True
