"""The health of one engine as a pure state machine: what follows from what, and when to try again."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum


class Health(StrEnum):
    """starting → syncing → healthy; from each of them to dead; from dead to starting."""

    STARTING = "starting"  # its process comes up
    SYNCING = "syncing"  # it runs, and waits for the weights of the current version; gets no work
    HEALTHY = "healthy"  # gets work
    DEAD = "dead"  # ended, or being ended


TRANSITIONS = {
    Health.STARTING: frozenset({Health.SYNCING, Health.DEAD}),
    Health.SYNCING: frozenset({Health.HEALTHY, Health.DEAD}),
    Health.HEALTHY: frozenset({Health.HEALTHY, Health.DEAD}),
    Health.DEAD: frozenset({Health.STARTING}),
}


@dataclass(frozen=True)
class RestartPolicy:
    """The first restart is at once; then delays double up to `max_delay_s`. After `max_restarts` failures in a row,
    with no `stable_s` of health in between, an engine is given up."""

    max_restarts: int
    first_delay_s: float = 1.0
    max_delay_s: float = 60.0
    stable_s: float = 60.0

    def delay_s(self, failures: int) -> float:
        """Before the restart after so many failures in a row, from 1."""
        return 0.0 if failures <= 1 else min(self.max_delay_s, self.first_delay_s * 2.0 ** (failures - 2))


@dataclass(frozen=True)
class Record:
    """`since`: of the state, seconds on any clock. `failures`: in a row. `incarnation`: counts starts."""

    state: Health
    since: float
    failures: int = 0
    incarnation: int = 0

    def to(self, state: Health, now: float, policy: RestartPolicy) -> Record:
        """The record after the transition.

        Raises:
            ValueError: the transition is not one of TRANSITIONS.
        """
        if state not in TRANSITIONS[self.state]:
            raise ValueError(f"an engine that is {self.state} cannot become {state}")
        if state is self.state:
            return self
        failures, incarnation = self.failures, self.incarnation
        if state is Health.DEAD:
            was_stable = self.state is Health.HEALTHY and now - self.since >= policy.stable_s
            failures = 1 if was_stable else failures + 1
        if state is Health.STARTING:
            incarnation += 1
        return replace(self, state=state, since=now, failures=failures, incarnation=incarnation)

    def is_given_up(self, policy: RestartPolicy) -> bool:
        return self.state is Health.DEAD and self.failures > policy.max_restarts


@dataclass(frozen=True)
class Progress:
    """Of an engine when it was last looked at. `num_tokens`: sampled so far; `at`: when that last changed, or when
    there was nothing to do."""

    num_tokens: int
    at: float

    def after(self, num_running: int, num_tokens: int, now: float) -> Progress:
        if num_running == 0 or num_tokens != self.num_tokens:
            return Progress(num_tokens, now)
        return self

    def is_hung(self, now: float, deadline_s: float) -> bool:
        """Requests run, and for so long not one token came."""
        return now - self.at > deadline_s
