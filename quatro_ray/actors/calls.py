"""Calls to Ray actors as coroutines, and what Ray raises if the actor is gone."""

from __future__ import annotations

import asyncio
from typing import Any

import ray
from ray.exceptions import ActorUnschedulableError, OutOfMemoryError, RayActorError

ACTOR_DIED = (RayActorError, OutOfMemoryError, ActorUnschedulableError)
"""The exceptions that Ray raises if an actor is gone; OutOfMemoryError if Ray's memory monitor killed it."""


async def value_of(ref: Any) -> Any:
    """Return the value of an object reference, as a coroutine to which timeouts.py:within can give a deadline."""
    return await ref


async def value_or_cancel(ref: Any) -> Any:
    """Return the value of an object reference; if the wait is cancelled, as at a deadline, cancel the work too."""
    try:
        return await ref
    except asyncio.CancelledError:
        ray.cancel(ref)
        raise
