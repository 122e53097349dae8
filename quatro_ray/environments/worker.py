"""The program of an episode's process: `python -m quatro_ray.environments.worker`. One episode at a time.

A request starts an episode or brings the policy's turn; the answer asks for a turn or says what the episode returned,
with all that was given to the policy since the answer before (isolation/protocol.py).
"""

from __future__ import annotations

import asyncio
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from quatro_ray.environments.registry import load_environment
from quatro_ray.isolation.protocol import Pipes, serve
from quatro_ray.types import Query, Turn


def _make_player(hello: dict[str, Any]) -> Callable[[Pipes, dict[str, Any]], dict[str, Any]]:
    function = load_environment(hello["function"], hello["params"])

    def play(pipes: Pipes, request: dict[str, Any]) -> dict[str, Any]:
        policy = PipedPolicy(pipes)
        result = function(Query(**request["query"]), policy, **hello["params"])
        if inspect.iscoroutine(result):
            result = asyncio.run(result)
        return {"end": _numbers(result)}

    return play


class PipedPolicy:
    """environments/base.py: Policy, with the engine at the other end of the pipes."""

    def __init__(self, pipes: Pipes) -> None:
        self._pipes = pipes
        self._over = False
        self._given: list[tuple[str, str]] = []  # since the last turn

    def generate(self, *, stop: Sequence[str] = (), max_tokens: int | None = None) -> Turn | None:
        if self._over:
            raise RuntimeError("policy.generate() was called again after it had returned None: end the episode then")
        if isinstance(stop, str) or (max_tokens is not None and max_tokens < 1):
            raise ValueError(f"generate(stop={stop!r}, max_tokens={max_tokens}): a list of strings, and 1 or more")
        self._pipes.write({"generate": {"stop": list(stop), "max_tokens": max_tokens}, "given": self._given})
        self._given = []
        request = self._pipes.read()
        if request is None:  # the parent has gone
            sys.exit(1)
        self._over = request["turn"] is None
        return None if self._over else Turn(**request["turn"])

    def give(self, text: str, role: str = "user") -> None:
        if not isinstance(text, str) or not isinstance(role, str):
            raise TypeError(f"give() takes text and a role, not {type(text).__name__} and {type(role).__name__}")
        self._given.append((text, role))


def _numbers(result: Any) -> dict[str, float]:
    """Raises TypeError where it is neither numbers by name, nor a number, nor None."""
    if result is None:
        return {}
    try:
        return {str(k): float(v) for k, v in (result if isinstance(result, Mapping) else {"reward": result}).items()}
    except (TypeError, ValueError) as error:
        raise TypeError(f"an episode must return a number, numbers by name, or None, not {result!r:.80}") from error


if __name__ == "__main__":
    serve(_make_player)
