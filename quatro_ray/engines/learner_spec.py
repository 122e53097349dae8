"""Specification of a learner; importing it is cheap, so that the process that spawns the ranks loads no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from quatro_ray.config import LearnerConfig, ObjectiveConfig


@dataclass(frozen=True, kw_only=True)
class LearnerSpec:
    """Everything that all ranks of a learner have in common.

    Attributes:
        model_path: folder or hub name of the starting policy, which is also the reference policy.
        temperature: sampling temperature; log-probs are those of the distribution that was sampled from.
        max_response_tokens: longest possible response, in tokens; the divisor of seq_mean_token_sum_norm.
        num_steps: optimiser steps of the run, for the learning rate schedule.
        device_share: share of its GPU's memory that a rank may take, because an engine has the rest.
        frees_memory: whether a rank frees what it does not need between batches, because an engine then takes it.
    """

    model_path: str
    config: LearnerConfig
    objective: ObjectiveConfig
    device: Literal["cpu", "cuda"]
    temperature: float
    max_response_tokens: int
    seed: int
    num_steps: int
    device_share: float = 1.0
    frees_memory: bool = False
