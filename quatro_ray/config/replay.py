"""The `replay` section: the asynchronous buffer between generators and learner."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from quatro_ray.config.base import Section


class ReplayConfig(Section):
    """The asynchronous buffer between generators and learner."""

    groups_per_step: int = Field(ge=1)
    """B: queries of one optimiser step."""
    group_size: int = Field(ge=2)
    """G: rollouts of one query (called n_samples_per_prompt elsewhere)."""
    max_staleness: int = Field(ge=0)
    """Largest difference between the learner's version and a token's version, in optimiser steps. 0: synchronous."""
    on_stale: Literal["drop", "train"] = "drop"
    """Treatment of a group that exceeds max_staleness when it is leased. drop: drop it with a reason. train: train on
    it all the same."""
    keep_steps: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """Optimiser steps whose rollouts, and the checkpoint before each, are kept for `quatro-ray replay`."""
    deadline_s: float = Field(120, gt=0)
    """Seconds to wait for one answer of the buffer."""
