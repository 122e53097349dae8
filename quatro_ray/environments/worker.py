"""The program of a process that plays episodes, one at a time: `python -m quatro_ray.environments.worker`.

A request starts an episode or carries the policy's turn. The answer asks for the next turn, with the context given
since the last answer, or it carries what the episode returned (isolation/protocol.py).
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Coroutine, Mapping, Sequence

from quatro_ray.environments.base import EpisodeResult
from quatro_ray.environments.registry import load_environment
from quatro_ray.isolation.protocol import Handler, Message, Pipes, serve
from quatro_ray.types import Query, Turn


def _make_player(hello: Message) -> Handler:
    function = load_environment(hello["function"], hello["params"])

    def play(pipes: Pipes, request: Message) -> Message:
        policy = PipedPolicy(pipes)
        result = function(Query(**request["query"]), policy, **hello["params"])
        return {"end": _numbers(asyncio.run(result) if isinstance(result, Coroutine) else result)}

    return play


class PipedPolicy:
    """The Policy of environments/base.py, whose engine is at the other end of the pipes."""

    def __init__(self, pipes: Pipes) -> None:
        self._pipes = pipes
        self._over = False
        self._given: list[tuple[str, str]] = []  # text and role, since the last turn

    def generate(self, *, stop: Sequence[str] = (), max_tokens: int | None = None) -> Turn | None:
        """Ask the parent process for the policy's next turn; see environments/base.py:Policy.generate.

        Raises:
            RuntimeError: an earlier call returned None, so the episode is over.
            ValueError: `stop` is one string instead of several, or `max_tokens` is below 1.
        """
        if self._over:
            raise RuntimeError("policy.generate() was called after it returned None: end the episode at None")
        if isinstance(stop, str) or (max_tokens is not None and max_tokens < 1):
            raise ValueError(
                f"generate(stop={stop!r}, max_tokens={max_tokens}): stop must be a list of strings, "
                "and max_tokens at least 1"
            )
        self._pipes.write({"generate": {"stop": list(stop), "max_tokens": max_tokens}, "given": self._given})
        self._given = []
        request = self._pipes.read()
        if request is None:  # the parent has ended
            os._exit(1)
        self._over = request["turn"] is None
        return None if self._over else Turn(**request["turn"])

    def give(self, text: str, role: str = "user") -> None:
        """Keep the text until the next `generate`, which sends it; see environments/base.py:Policy.give.

        Raises:
            TypeError: the text or the role is not a string.
        """
        if not isinstance(text, str) or not isinstance(role, str):
            raise TypeError(
                f"give() takes a text and a role as strings, not {type(text).__name__} and {type(role).__name__}"
            )
        self._given.append((text, role))


def _numbers(result: EpisodeResult) -> dict[str, float]:
    """Return the numbers of a result by name.

    Raises:
        TypeError: the result is neither numbers by name, nor a number, nor None.
    """
    if result is None:
        return {}
    try:
        return {str(k): float(v) for k, v in (result if isinstance(result, Mapping) else {"reward": result}).items()}
    except (TypeError, ValueError) as error:
        raise TypeError(f"an episode must return a number, numbers by name, or None, not {result!r:.80}") from error


if __name__ == "__main__":
    serve(_make_player)
