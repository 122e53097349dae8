"""Measures how long the members of a role, such as the engines, spend in each of their states."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping

IDLE = "idle"
CONTROLLER = "controller"
"""The role whose phases come before training; it has no shares of time."""


class Activity:
    """The states of the members of one role. Each member is in exactly one state at any time.

    Args:
        clock: returns seconds that only increase.

    Attributes:
        on_span: called at the end of each stay in a state, with the member, the state, and the duration in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._now_in: dict[int, tuple[str, float]] = {}
        self._past: defaultdict[str, float] = defaultdict(float)
        self.on_span: Callable[[int, str, float], None] | None = None

    def enter(self, member: int, state: str) -> None:
        """Record that the member is in `state` from now on. A new member is added."""
        before, now = self._now_in.get(member), self._clock()
        if before is not None and before[0] == state:
            return
        self._now_in[member] = (state, now)  # at once: another thread sees the member all the time
        if before is not None:
            self._end(member, *before, now)

    def leave(self, member: int) -> None:
        """Record that the member is gone, if it is there."""
        if member in self._now_in:
            self._end(member, *self._now_in.pop(member), self._clock())

    def _end(self, member: int, state: str, since: float, now: float) -> None:
        self._past[state] += now - since
        if self.on_span is not None:
            self.on_span(member, state, now - since)

    def close(self) -> None:
        """Record that all members are gone, and call `on_span` no more."""
        for member in list(self._now_in):
            self.leave(member)
        self.on_span = None

    def now(self) -> dict[int, tuple[str, float]]:
        """Return the state of each member, and the seconds since it entered it. May be called by another thread."""
        members, now = self._now_in.copy(), self._clock()
        return {member: (state, now - since) for member, (state, since) in members.items()}

    def seconds(self) -> dict[str, float]:
        """Return the seconds in each state until now, summed over the members."""
        now, total = self._clock(), self._past.copy()
        for state, since in self._now_in.values():
            total[state] += now - since
        return dict(total)


def member_name(role: str, member: int) -> str:
    """Return the name of a member: `generator 0` in the role `generators`; the role itself if it has one member."""
    return f"{role.removesuffix('s')} {member}" if role.endswith("s") else role


def shares(seconds: Mapping[str, float], before: Mapping[str, float] | None = None) -> dict[str, float]:
    """Return the share of each state in the seconds since `before`, which add up to 1; empty if no time passed.

    Args:
        seconds: what `Activity.seconds` returned.
        before: what it returned earlier; None for the whole run.
    """
    spent = {state: value - (before or {}).get(state, 0.0) for state, value in seconds.items()}
    total = sum(spent.values())
    return {state: value / total for state, value in spent.items() if value > 0} if total > 0 else {}
