"""Calls to Ray actors as coroutines, and what Ray raises if the actor is gone."""

from __future__ import annotations

import asyncio
from typing import Any

import ray
from ray.exceptions import ActorUnschedulableError, OutOfMemoryError, RayActorError

ACTOR_DIED = (RayActorError, OutOfMemoryError, ActorUnschedulableError)
"""What Ray raises where an actor is gone; OutOfMemoryError where its memory monitor killed it."""


async def value_of(ref: Any) -> Any:
    """An object reference as a coroutine, which is what asyncio's deadlines take."""
    return await ref


async def value_or_cancel(ref: Any) -> Any:
    """Like `value_of`; where the wait is cancelled, past its deadline, the work is too."""
    try:
        return await ref
    except asyncio.CancelledError:
        ray.cancel(ref)
        raise
