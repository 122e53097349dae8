"""The health of one engine as a pure state machine: the allowed transitions, and the delay before a restart."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum


class Health(StrEnum):
    """The states of an engine: starting → syncing → healthy; from each of these to dead; from dead to starting."""

    STARTING = "starting"  # its process is starting
    SYNCING = "syncing"  # runs and waits for the current weights; gets no work
    HEALTHY = "healthy"  # gets work
    DEAD = "dead"  # ended, or is being killed


TRANSITIONS = {
    Health.STARTING: frozenset({Health.SYNCING, Health.DEAD}),
    Health.SYNCING: frozenset({Health.HEALTHY, Health.DEAD}),
    Health.HEALTHY: frozenset({Health.HEALTHY, Health.DEAD}),
    Health.DEAD: frozenset({Health.STARTING}),
}


@dataclass(frozen=True)
class RestartPolicy:
    """Decides when an engine is restarted, and when it is given up.

    The first restart has no delay; each later delay is twice the last one, up to `max_delay_s`.

    Attributes:
        max_restarts: an engine that fails more often than this in a row is given up.
        first_delay_s: seconds before the second restart.
        max_delay_s: longest delay, in seconds.
        stable_s: seconds of health after which the count of failures starts again.
    """

    max_restarts: int
    first_delay_s: float = 1.0
    max_delay_s: float = 60.0
    stable_s: float = 60.0

    def delay_s(self, failures: int) -> float:
        """Return the seconds to wait before the restart after `failures` failures in a row, which is at least 1."""
        return 0.0 if failures <= 1 else min(self.max_delay_s, self.first_delay_s * 2.0 ** (failures - 2))


@dataclass(frozen=True)
class Record:
    """The health of one engine.

    Attributes:
        since: time at which the state was entered, in seconds on any clock.
        failures: number of failures in a row.
        incarnation: number of starts.
    """

    state: Health
    since: float
    failures: int = 0
    incarnation: int = 0

    def to(self, state: Health, now: float, policy: RestartPolicy) -> Record:
        """Return the record after the transition to `state`.

        Args:
            state: the new state; HEALTHY may follow HEALTHY, which changes nothing.
            now: time of the transition, in seconds on the clock of `since`.
            policy: its `stable_s` decides whether a loss counts as the first failure in a row.

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
        """Return whether the engine has failed too often to be restarted."""
        return self.state is Health.DEAD and self.failures > policy.max_restarts


@dataclass(frozen=True)
class Progress:
    """The progress of an engine at the last check.

    Attributes:
        num_tokens: tokens sampled so far.
        at: time at which `num_tokens` last changed or the engine was last idle, in seconds on any clock.
    """

    num_tokens: int
    at: float

    def after(self, num_running: int, num_tokens: int, now: float) -> Progress:
        """Return the progress after a check.

        Args:
            num_running: requests that the engine works on.
            num_tokens: tokens sampled so far.
            now: time of the check, in seconds on the clock of `at`.
        """
        if num_running == 0 or num_tokens != self.num_tokens:
            return Progress(num_tokens, now)
        return self

    def is_hung(self, now: float, deadline_s: float) -> bool:
        """Return whether requests are running and no token was sampled for more than `deadline_s`."""
        return now - self.at > deadline_s
