"""The interface of an environment. docs/environments.md starts with one in ten lines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from quatro_ray.types import Query, Turn


class Policy(Protocol):
    """The policy, as an episode talks to it."""

    def generate(self, *, stop: Sequence[str] = (), max_tokens: int | None = None) -> Turn | None:
        """What the policy says next.

        Args:
            stop: strings at which its turn ends; the text ends with the one that it met.
            max_tokens: of this turn; None: as many as there is room for.

        Returns:
            None where the episode has no room or no turn left: it must end now.
        """
        ...

    def give(self, text: str, role: str = "user") -> None:
        """Puts text in front of the policy's next turn. It is context: not trained on.

        Args:
            role: of the message, in a chat; a prompt without a chat template gets the text as it is.
        """
        ...


class Environment(Protocol):
    """One episode: a function, in a process of its own, that may block, and that may be `async def`.

    A function of its arguments alone: where its process is lost, it is called again and hears the same turns.

    Returns:
        A number or numbers by name, for rewards of kind `environment`; None where other rewards judge.

    Raises:
        Exception: anything, where it cannot go on. The group is generated again and then dropped; never a reward.
    """

    def __call__(self, query: Query, policy: Policy, **params: Any) -> Mapping[str, float] | float | None: ...
