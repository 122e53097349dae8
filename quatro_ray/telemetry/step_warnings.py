"""Warns during training if the metrics of many steps in a row show that something limits or prevents learning."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

NUM_STEPS = 10
"""Consecutive steps for which a condition must hold before the warning is given."""
MIN_KEPT = 0.05
"""Fraction of the optimiser's step below which step control shortens it too much."""
MIN_SAMPLE_SHARE = 0.05
"""Effective sample size, as a share of all samples, below which few samples make up the gradient."""


@dataclass(frozen=True)
class Condition:
    """A state of training that a user should know of.

    Attributes:
        metrics: the metrics on which it depends. A step that lacks one neither confirms nor ends the condition.
        holds: tells from the values of these metrics, in their order; None has the effect of a metric that is missing.
        text: what the condition means, and what to change.
    """

    metrics: tuple[str, ...]
    holds: Callable[..., bool | None]
    text: str


_CONDITIONS = (
    Condition(
        ("step/uninformative",),
        lambda uninformative: uninformative == 1,
        "no step was taken (step/uninformative is 1), because no advantage differs from 0: in every group all rewards "
        "are equal, or your own objective.advantage returned 0 everywhere. If reward/mean is near its minimum, the "
        "questions are too hard or the rewards do not recognise right answers (rollouts.jsonl shows responses and "
        "answers); if it is near its maximum, the questions are solved. Change data.train or rewards, raise "
        "replay.group_size, or set filters.drop_zero_variance",
    ),
    Condition(
        ("trust_region/frac_active", "trust_region/frac_void"),
        lambda active, void: None if void == 1 else active == 0,
        "no query met its KL budget (trust_region/frac_active is 0) although rewards differ (trust_region/frac_void is "
        "below 1), so the trust region limits nothing: the cap on η applies first in every group, as it does if the "
        "best rewards of a group are nearly equal. Lower objective.tilt_share, or round the rewards so that such "
        "differences vanish",
    ),
    Condition(
        ("step_control/kept",),
        lambda kept: kept < MIN_KEPT,
        f"step control kept less than {MIN_KEPT:g} of the optimiser's step (step_control/kept), which is far longer "
        "than the KL budget of a step allows. Lower learner.learning_rate by the factor step_control/kept, or raise "
        "learner.step_control.max_kl_nats_per_token and window_kl_nats_per_token",
    ),
    Condition(
        ("rollout_corr/token_eff_sample_size",),
        lambda share: share < MIN_SAMPLE_SHARE,
        f"the importance weights of the tokens are worth less than {MIN_SAMPLE_SHARE:g} of the tokens "
        "(rollout_corr/token_eff_sample_size): the policy has moved far from the one that sampled, and a few tokens "
        "would make up the gradient if their weights were not bounded. Lower replay.max_staleness or "
        "learner.learning_rate. (rollout_corr/eff_sample_size, of whole responses, falls with their length at any "
        "drift, and is no reason for this warning)",
    ),
)

_WHOLE_RESPONSES = Condition(
    ("rollout_corr/eff_sample_size",),
    lambda share: share < MIN_SAMPLE_SHARE,
    f"the importance weights of the responses are worth less than {MIN_SAMPLE_SHARE:g} of the responses "
    "(rollout_corr/eff_sample_size), so a few responses make up the gradient. Weights of whole responses are products "
    "over their tokens and degenerate with length, even if the policy has hardly moved. Set the level of the weights "
    "to token (objective.importance.level, or objective.level of mis_grpo), or lower replay.max_staleness",
)


class StepWarnings:
    """Watches the steps of a run. A warning is given once, and again only after its condition ended and came back.

    Args:
        response_weights: whether the objective weighs whole responses, so that their effective sample size matters.
    """

    def __init__(self, *, response_weights: bool) -> None:
        conditions = (*_CONDITIONS, _WHOLE_RESPONSES) if response_weights else _CONDITIONS
        self._steps_in_a_row = dict.fromkeys(conditions, 0)

    def add(self, metrics: Mapping[str, object]) -> Iterator[str]:
        """Count a step, and yield the warnings that are due."""
        for condition in self._steps_in_a_row:
            values = [metrics.get(name) for name in condition.metrics]
            holds = None if None in values else condition.holds(*values)
            if holds is None:
                continue
            self._steps_in_a_row[condition] = self._steps_in_a_row[condition] + 1 if holds else 0
            if self._steps_in_a_row[condition] == NUM_STEPS:
                yield f"warning: for {NUM_STEPS} steps, {condition.text}"
