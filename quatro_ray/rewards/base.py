"""The interfaces of a reward. docs/rewards.md starts with a reward in ten lines."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from quatro_ray.types import Query, Response


class AnswerUnreadable(Exception):
    """The scorer raised on what the model wrote, twice, while it scores the expected answer: the reward is 0."""


class Reward(Protocol):
    """Scores one response in a worker process, which is killed if it misses its deadline.

    A reward is a pure function of its arguments. If it cannot score a response it raises and never guesses: the
    scoring is retried, then the group is dropped with that reason. AnswerUnreadable alone is a reward of 0, and is
    counted as the outcome `unreadable`.
    """

    def __call__(self, query: Query, response: Response) -> float | None:
        """Return the reward of a response to the query, before its weight; raise if it cannot be scored.

        None is no verdict: the scoring is retried, then the group is dropped as no_verdict.
        """
        ...


@runtime_checkable
class CheckingReward(Protocol):
    """A reward that can tell, when the data is loaded, whether it can score responses to a query."""

    def check(self, query: Query) -> str | None:
        """Return why responses to the query cannot be scored, or None if they can."""
        ...


class RemoteReward(Protocol):
    """Asks a server for the reward, in the event loop of the verifier actor, and enforces its own time limits."""

    async def __call__(self, query: Query, response: Response) -> float:
        """Return the reward of a response to the query, before its weight.

        Raises:
            RewardUnavailable: the server gave no reward, retries included.
        """
        ...

    async def close(self) -> None:
        """Release the connections; no response is scored afterwards."""
        ...
