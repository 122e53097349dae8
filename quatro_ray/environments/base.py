"""The interface of an environment. docs/environments.md begins with an environment in ten lines."""

from __future__ import annotations

from collections.abc import Coroutine, Mapping, Sequence
from typing import Any, Protocol

from quatro_ray.types import Query, Turn

EpisodeResult = Mapping[str, float] | float | None
"""The result of an episode: numbers by name, one number (whose name is `reward`), or None if other rewards score it."""


class Policy(Protocol):
    """The policy that an episode talks to."""

    def generate(self, *, stop: Sequence[str] = (), max_tokens: int | None = None) -> Turn | None:
        """Return the policy's next turn.

        Args:
            stop: strings that end the turn; the text then ends with the one that was met.
            max_tokens: limit of this turn; None for as many tokens as the response may still have.

        Returns:
            The turn, or None if the episode has no tokens or no turns left and must end now.
        """
        ...

    def give(self, text: str, role: str = "user") -> None:
        """Put text before the policy's next turn, as context that is not trained on.

        Args:
            text: result of a tool, a question, or whatever else the policy is to read.
            role: role of the message, in a chat. In a plain prompt the text is used as it is.
        """
        ...


class Environment(Protocol):
    """A function that plays one episode in its own process; it may block, and it may be `async def`.

    It must depend on its arguments alone: if its process is lost, it is called again and gets the same turns.

    Returns:
        Numbers by name or one number, for rewards of kind `environment`; None if only other rewards score the episode.

    Raises:
        Exception: any, if the episode cannot continue. The group is generated again and then dropped; an exception
            never becomes a reward.
    """

    def __call__(
        self, query: Query, policy: Policy, **params: Any
    ) -> EpisodeResult | Coroutine[Any, Any, EpisodeResult]:
        """Play one episode of the query; `params` are those of the environment in the configuration."""
        ...
