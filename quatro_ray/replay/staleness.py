"""The only place that compares policy versions.

Staleness of a token = learner version − version that sampled it, in optimiser steps.
"""

from __future__ import annotations

from typing import Any


def capacity(*, max_staleness: int, version: int, groups_per_step: int, num_live: int) -> int:
    """How many more groups may be admitted: (η + k + 1)·B − live, at least 0.

    With groups trained in the order of admission, the n-th live one is trained at step n // B, so a group
    admitted under version k is at most η = max_staleness versions old then. At η = 0 a step's groups are
    admitted only once the weights of that step are with the engines: synchronous training.

    Args:
        version: k, the version that the engines have now.
        num_live: groups admitted so far that were not dropped: trained, waiting or under way.
    """
    return max(0, (max_staleness + version + 1) * groups_per_step - num_live)


def staleness(learner_version: int, versions: Any) -> Any:
    """Elementwise for arrays and tensors."""
    return learner_version - versions


def is_expired(*, oldest_version: int, learner_version: int, max_staleness: int) -> bool:
    """Whether a group, by its oldest token, can no longer be trained within the cap; it stays so for ever."""
    return learner_version - oldest_version > max_staleness
