"""Decides which scored groups are trained on: each filter returns a reason to drop a group, or None."""

from __future__ import annotations

from collections.abc import Sequence

from quatro_ray.config import FilterConfig
from quatro_ray.types import DropReason


def why_not(config: FilterConfig, rewards: Sequence[float], num_truncated: int) -> DropReason | None:
    """Return the first reason to drop a group, or None to keep it.

    Args:
        config: the filters; a threshold of None switches its filter off.
        rewards: [G], the reward of each response.
        num_truncated: number of the G responses that were truncated.
    """
    for rule in (_zero_variance, _difficulty, _truncated):
        if reason := rule(config, rewards, num_truncated):
            return reason
    return None


def _zero_variance(config: FilterConfig, rewards: Sequence[float], _: int) -> DropReason | None:
    """Apply DAPO's dynamic sampling, arXiv 2503.14476, section 3.2."""
    return DropReason.ZERO_VARIANCE if config.drop_zero_variance and min(rewards) == max(rewards) else None


def _difficulty(config: FilterConfig, rewards: Sequence[float], _: int) -> DropReason | None:
    mean = sum(rewards) / len(rewards)
    if config.min_mean_reward is not None and mean < config.min_mean_reward:
        return DropReason.TOO_HARD
    if config.max_mean_reward is not None and mean > config.max_mean_reward:
        return DropReason.TOO_EASY
    return None


def _truncated(config: FilterConfig, rewards: Sequence[float], num_truncated: int) -> DropReason | None:
    limit = config.max_truncated_share
    return DropReason.OVERLONG if limit is not None and num_truncated > limit * len(rewards) else None
