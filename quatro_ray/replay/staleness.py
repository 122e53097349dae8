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
    """Consecutive versions, one optimiser step apart.

    Attributes:
        first: the first version.
        last: the last version.
        step: optimiser steps of the policy of version `first`.
    """

    first: int
    last: int
    step: int


@dataclass(frozen=True)
class Lineage:
    """The versions through which the learner's policy came, up to `version`; the oldest stretch is first."""

    stretches: tuple[Stretch, ...]

    @classmethod
    def unbroken(cls, version: int) -> Lineage:
        """Return the lineage of a learner that never fell back, whose versions are its optimiser steps."""
        return cls((Stretch(0, version, 0),))

    @property
    def version(self) -> int:
        """The learner's version."""
        return self.stretches[-1].last

    @property
    def step(self) -> int:
        """Optimiser steps of the learner's policy."""
        return self.stretches[-1].step + self.stretches[-1].last - self.stretches[-1].first

    def holds(self, version: int) -> bool:
        """Return whether the version belongs to the lineage; an abandoned or a future version does not."""
        return any(s.first <= version <= s.last for s in self.stretches)

    def staleness(self, versions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the age of the policies of `versions`, int64 [N], in optimiser steps.

        Args:
            versions: int64 [N]; the lineage must hold them.
        """
        firsts = np.array([s.first for s in self.stretches])
        offsets = np.array([s.step - s.first for s in self.stretches])
        which = np.maximum(np.searchsorted(firsts, versions, side="right") - 1, 0)
        age: NDArray[np.int64] = self.step - (versions + offsets[which])
        return age

    def oldest_within(self, max_staleness: int) -> int:
        """Return the oldest version of the lineage that is at most `max_staleness` optimiser steps old.

        Groups with an older token have expired, and stay expired.
        """
        step = self.step - max_staleness
        stretch = next(s for s in self.stretches if step <= s.step + s.last - s.first)
        return stretch.first + max(0, step - stretch.step)


def capacity(*, max_staleness: int, step: int, groups_per_step: int, num_live: int) -> int:
    """Return how many more groups may be admitted: (max_staleness + step + 1)·B − num_live, at least 0.

    If groups are trained in the order of admission, the n-th live group is trained at step n // B. A group admitted
    under a policy of `step` optimiser steps is thus at most `max_staleness` steps old when it is trained. If
    max_staleness is 0, the groups of a step are admitted only when the engines have the weights of that step, which is
    synchronous training.

    Args:
        max_staleness: largest allowed age of a token, in optimiser steps.
        step: optimiser steps of the policy that the engines have now.
        groups_per_step: B.
        num_live: groups admitted so far that were not dropped: trained, ready or in progress.
    """
    return max(0, (max_staleness + step + 1) * groups_per_step - num_live)
