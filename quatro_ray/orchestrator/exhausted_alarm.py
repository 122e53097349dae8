"""Warns if many responses exceed the limits of their rewards, because then the limits are too low for the reward."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

from quatro_ray.types import Outcome

_NUM_GROUPS = 8
MAX_SHARE = 0.2
"""Share of exhausted responses, among those of the last groups, above which the alarm is given."""


class ExhaustedAlarm:
    """Watches the outcomes of the last scored groups."""

    def __init__(self) -> None:
        self._recent: deque[tuple[int, int]] = deque(maxlen=_NUM_GROUPS)

    def add(self, outcomes: Mapping[str, int]) -> str | None:
        """Count a scored group, and return the warning if there is one; the next comes after as many groups again.

        Args:
            outcomes: number of responses by Outcome.
        """
        self._recent.append((outcomes.get(str(Outcome.EXHAUSTED), 0), sum(outcomes.values())))
        num_exhausted, num = (sum(counts) for counts in zip(*self._recent, strict=True))
        if len(self._recent) < _NUM_GROUPS or num_exhausted <= MAX_SHARE * num:
            return None
        self._recent.clear()
        return (
            f"{num_exhausted} of the last {num} responses were exhausted: they exceeded verifier.deadline_s or "
            "verifier.memory_mib twice, and got verifier.exhausted_reward. If the reward itself is that slow or large "
            "(such as one that loads a model), raise these limits, or load what it needs when its module is imported"
        )
