"""Metrics of the groups that a step trains on, and of groups that expired: rewards, pass rates, lengths."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean

import numpy as np

from quatro_ray.telemetry.length_bins import length_bin
from quatro_ray.types import Rollout, RolloutGroup, StepMetrics


def batch_metrics(groups: Sequence[RolloutGroup]) -> StepMetrics:
    """Return the metrics of all rollouts in a batch, at least one; docs/run_directory.md explains each one."""
    rollouts = [r for g in groups for r in g.rollouts]
    return {
        "rollout/num": len(rollouts),
        "rollout/truncated_share": _mean(r.truncated for r in rollouts),
        "rollout/turns": _mean(r.num_turns for r in rollouts),
        **_lengths("prompt", [len(g.prompt_token_ids) for g in groups]),
        **_lengths("response", [r.num_sampled for r in rollouts]),
        **_reward_metrics(groups),
        **_source_metrics(groups),
    }


def drop_metrics(reason: str, groups: Sequence[RolloutGroup]) -> dict[str, float]:
    """Return number, mean length and pass rate of groups dropped for `reason`; empty if there are none."""
    if not groups:
        return {}
    rollouts = [r for g in groups for r in g.rollouts]
    return {
        f"drops/{reason}": len(groups),
        f"drops/{reason}_response_tokens_mean": _mean(r.num_sampled for r in rollouts),
        f"drops/{reason}_pass_rate": _mean(is_correct(r) for r in rollouts),
    }


def is_correct(rollout: Rollout) -> bool:
    """Return whether the first reward of the configuration that applies to the query gave at least 1."""
    values = rollout.score.reward_values if rollout.score else {}
    return next(iter(values.values()), 0.0) >= 1.0


def _lengths(name: str, lengths: Sequence[int]) -> StepMetrics:
    return {
        f"rollout/{name}_tokens_mean": _mean(lengths),
        f"rollout/{name}_tokens_max": max(lengths),
        f"rollout/{name}_tokens_histogram": dict(sorted(Counter(map(length_bin, lengths)).items())),
    }


def _reward_metrics(groups: Sequence[RolloutGroup]) -> dict[str, float]:
    """Return the spread of rewards, and the mean of each part; like reward/mean each group counts once."""
    rewards = np.concatenate([g.rewards() for g in groups])
    parts: dict[str, list[float]] = {}
    for group in groups:
        for name, values in _parts(group).items():
            parts.setdefault(name, []).append(_mean(values))
    return {
        "reward/std": float(rewards.std()),
        "reward/group_std_mean": _mean(float(g.rewards().std()) for g in groups),
        "reward/min": float(rewards.min()),
        "reward/max": float(rewards.max()),
        **{f"reward/part_{name}": _mean(of_groups) for name, of_groups in parts.items()},
    }


def _parts(group: RolloutGroup) -> Mapping[str, list[float]]:
    values: dict[str, list[float]] = {}
    for rollout in group.rollouts:
        for name, value in rollout.score.reward_values.items() if rollout.score else ():
            values.setdefault(name, []).append(value)
    return values


def _source_metrics(groups: Sequence[RolloutGroup]) -> dict[str, float]:
    """Return pass rates, and by data source the number of groups and their reward and pass rate."""
    metrics = {"pass_rate/mean": _mean(_pass_rate(g) for g in groups)}
    for source in sorted({g.query.source for g in groups}):
        of_source = [g for g in groups if g.query.source == source]
        metrics[f"groups/source_{source}"] = len(of_source)
        metrics[f"reward/source_{source}"] = _mean(float(g.rewards().mean()) for g in of_source)
        metrics[f"pass_rate/source_{source}"] = _mean(_pass_rate(g) for g in of_source)
    return metrics


def _pass_rate(group: RolloutGroup) -> float:
    return _mean(map(is_correct, group.rollouts))


def _mean(values: Iterable[float]) -> float:
    return fmean(values)
