"""The interface of a reward. docs/rewards.md starts with one in ten lines."""

from __future__ import annotations

from typing import Protocol

from quatro_ray.types import Query, Response


class Reward(Protocol):
    """Judges one response, in a worker process that is killed when it misses its deadline.

    A pure function of its arguments. It raises where it cannot judge and never guesses: an exception is retried and
    then drops the group with that reason; it is no reward of 0.
    """

    def __call__(self, query: Query, response: Response) -> float: ...


class RemoteReward(Protocol):
    """Asks a server, in the event loop of the verifier actor; holds its own time limits.

    Raises:
        RewardUnavailable: the server did not judge, retries included.
    """

    async def __call__(self, query: Query, response: Response) -> float: ...

    async def close(self) -> None: ...
