"""The only place that compares policy versions.

Version numbers are never reused: if the learner falls back to a checkpoint, its policy gets a new number, and the
versions since that checkpoint are abandoned. Age is therefore counted in optimiser steps, not in versions, along the
lineage of versions from which the learner's policy came. The staleness of a token is the learner's number of steps
minus that of the policy that sampled the token.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Stretch:
    """Consecutive versions `first` … `last`, one optimiser step apart; `step`: optimiser steps before `first`."""

    first: int
    last: int
    step: int


@dataclass(frozen=True)
class Lineage:
    """What the policy of version `version` has come through, oldest stretch first."""

    stretches: tuple[Stretch, ...]

    @classmethod
    def unbroken(cls, version: int) -> Lineage:
        """A learner that never fell back: versions are steps."""
        return cls((Stretch(0, version, 0),))

    @property
    def version(self) -> int:
        return self.stretches[-1].last

    @property
    def step(self) -> int:
        """Optimiser steps of the present policy."""
        return self.stretches[-1].step + self.stretches[-1].last - self.stretches[-1].first

    def holds(self, version: int) -> bool:
        """False: abandoned, or yet to come."""
        return any(s.first <= version <= s.last for s in self.stretches)

    def staleness(self, versions: NDArray[np.int64]) -> NDArray[np.int64]:
        """int64 [N] → int64 [N], optimiser steps; only for versions that the lineage holds."""
        firsts = np.array([s.first for s in self.stretches])
        offsets = np.array([s.step - s.first for s in self.stretches])
        which = np.maximum(np.searchsorted(firsts, versions, side="right") - 1, 0)
        age: NDArray[np.int64] = self.step - (versions + offsets[which])
        return age

    def is_expired(self, oldest_version: int, max_staleness: int) -> bool:
        """Whether a group, by its oldest token, can no longer be trained within the cap; it stays so for ever."""
        return int(self.staleness(np.array([oldest_version]))[0]) > max_staleness


def capacity(*, max_staleness: int, step: int, groups_per_step: int, num_live: int) -> int:
    """How many more groups may be admitted: (η + k + 1)·B − live, at least 0.

    With groups trained in the order of admission, the n-th live one is trained at step n // B, so a group
    admitted after k steps is at most η = max_staleness steps old then. At η = 0 a step's groups are
    admitted only once the weights of that step are with the engines: synchronous training.

    Args:
        step: k, optimiser steps of the policy that the engines have now.
        num_live: groups admitted so far that were not dropped: trained, waiting or under way.
    """
    return max(0, (max_staleness + step + 1) * groups_per_step - num_live)
