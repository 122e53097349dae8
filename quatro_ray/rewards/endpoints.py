"""Chooses the server for the next request: pure state, with an injected clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

REST_S = 5.0
"""Seconds for which a server that failed is passed over if another one is available."""


@dataclass
class Endpoint:
    """One server.

    Attributes:
        rests_until: clock time until which other servers are preferred.
        closed_until: clock time until which the server asked for no requests (Retry-After).
    """

    url: str
    rests_until: float = 0.0
    closed_until: float = 0.0


class Endpoints:
    """Round-robin over the servers that are available; if none is, the one that will be available first."""

    def __init__(self, urls: Sequence[str], clock: Callable[[], float] = time.monotonic) -> None:
        self._all = [Endpoint(url) for url in urls]
        self._clock = clock
        self._next = 0

    def pick(self) -> Endpoint:
        """Return the server for the next request."""
        turn = self._all[self._next :] + self._all[: self._next]
        now = self._clock()
        chosen = min(turn, key=lambda e: max(now, e.rests_until, e.closed_until))  # the first of equals
        self._next = (self._all.index(chosen) + 1) % len(self._all)
        return chosen

    def failed(self, endpoint: Endpoint, retry_after_s: float) -> None:
        """Record that a request failed; `retry_after_s`: seconds for which the server asked for no requests, or 0."""
        now = self._clock()
        endpoint.rests_until = now + REST_S
        endpoint.closed_until = max(endpoint.closed_until, now + retry_after_s)

    def worked(self, endpoint: Endpoint) -> None:
        """Record that the server answered."""
        endpoint.rests_until = 0.0

    def closed_s(self, endpoint: Endpoint) -> float:
        """Return the seconds that remain of the time for which the server asked for no requests."""
        return max(0.0, endpoint.closed_until - self._clock())
