"""Which metrics of a run Prometheus gets, under which names and with which labels (docs/monitoring.md)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from statistics import fmean
from typing import NamedTuple

from quatro_ray.types import DropReason

_LABEL = re.compile(r"\\{(\w+)\\}")
_VALUES = {
    "reason": "|".join(DropReason),
    "outcome": "[a-z]+",
    "status": "[a-z]+",
    "role": "[a-z]+",
    "state": "[a-z_]+",
    "what": "[a-z_]+",
    "k": r"\d+",
}
"""Patterns of label values. Labels that are not here are names from the configuration, so there are few of each."""


@dataclass(frozen=True)
class Family:
    """A metric of Prometheus, with one series for each combination of its labels.

    Attributes:
        name: the name without the prefix `ray_`, which Ray adds.
        source: the metric of metrics.jsonl from which it comes, with `{label}` in place of each label. Evaluations are
            `eval/{set}/FIELD`; a source without a slash says where else the value comes from.
        text: what it measures.
        is_added: the values of the steps are added up.
    """

    name: str
    source: str
    text: str
    is_added: bool = False

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """The names of the labels, besides `run`."""
        return tuple(re.findall(r"\{(\w+)\}", self.source))

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """Matches the names of metrics that belong to the family; the groups are the labels."""
        return re.compile(_LABEL.sub(lambda found: f"({_VALUES.get(found[1], '.+')})", re.escape(self.source)))


STEP = Family("quatro_step", "step", "Optimiser steps of the policy; it falls when the policy falls back.")
LAST_STEP = Family(
    "quatro_last_step_timestamp_seconds",
    "time of the record",
    "Unix time of the last step, or of the start of this process before its first step.",
)
EVENTS = Family(
    "quatro_events_total",
    "events.jsonl: {event} of {part}",
    "Events by what happened and to what kind of component.",
)
NUM_STEPS = Family("quatro_num_steps", "run.num_steps", "Optimiser steps of the whole run.")
MAX_STALENESS = Family("quatro_max_staleness", "replay.max_staleness", "Highest staleness that is allowed.")
NUM_ENGINES = Family("quatro_num_engines", "generator.num_engines", "Engines that the configuration asks for.")
DROPS = Family("quatro_drops_total", "drops/{reason}", "Dropped groups.", is_added=True)

OF_STEPS = (
    Family("quatro_reward_mean", "reward/mean", "Reward of the batch; each group counts once."),
    Family("quatro_reward_zero_std_share", "reward/frac_zero_std", "Share of groups whose rewards are all equal."),
    Family("quatro_reward_part_mean", "reward/part_{part}", "Value of one reward before its weight."),
    Family("quatro_source_reward_mean", "reward/source_{source}", "Reward of the groups of one data source."),
    Family("quatro_pass_rate", "pass_rate/mean", "Share of correct responses."),
    Family("quatro_source_pass_rate", "pass_rate/source_{source}", "Share of correct responses of a data source."),
    Family("quatro_groups_total", "groups/source_{source}", "Trained groups of a data source.", is_added=True),
    DROPS,
    Family("quatro_verifier_outcome_share", "verifier/{outcome}_share", "Share of scored responses by outcome."),
    Family("quatro_response_tokens_mean", "rollout/response_tokens_mean", "Mean length of a response."),
    Family("quatro_response_tokens_max", "rollout/response_tokens_max", "Longest response."),
    Family("quatro_truncated_share", "rollout/truncated_share", "Share of responses that a limit ended."),
    Family("quatro_entropy_nats", "policy/entropy", "Entropy per token."),
    Family("quatro_realised_kl_nats", "policy/realised_kl_nats", "KL to the behaviour policy, mean of queries."),
    Family("quatro_reference_kl_nats", "policy/reference_kl", "KL to the reference policy per token."),
    Family("quatro_limited_share", "policy_gradient/limited_share", "Share of tokens whose gradient was limited."),
    Family("quatro_trust_region_share", "trust_region/frac_{status}", "Share of queries by what ends their region."),
    Family("quatro_target_kl_nats", "trust_region/target_kl_nats", "KL of the targets, mean of queries."),
    Family("quatro_step_control_kept", "step_control/kept", "Fraction of the optimiser's step that was kept."),
    Family("quatro_step_control_budget_share", "step_control/share_of_budget", "KL of the step over its budget."),
    Family("quatro_staleness_mean", "off_policy/staleness_mean", "Age of the trained tokens in optimiser steps."),
    Family("quatro_staleness_max", "off_policy/staleness_max", "Highest age of a trained token."),
    Family("quatro_eff_sample_size", "rollout_corr/eff_sample_size", "Effective sample size of responses, as a share."),
    Family("quatro_token_eff_sample_size", "rollout_corr/token_eff_sample_size", "The same of tokens."),
    Family("quatro_logprob_abs_diff", "rollout_corr/logprob_abs_diff", "Difference of engine and learner, nats."),
    Family("quatro_checked_logprob_abs_diff", "weight_sync/logprob_abs_diff", "The same on fixed tokens, if checked."),
    Family("quatro_learning_rate", "step/learning_rate", "Learning rate of the step."),
    Family("quatro_grad_norm", "step/grad_norm", "Gradient norm before clipping."),
    Family("quatro_skipped_steps_total", "step/skipped", "Steps that were not applied.", is_added=True),
    Family("quatro_uninformative_steps_total", "step/uninformative", "Steps without any preference.", is_added=True),
    Family("quatro_trained_tokens_total", "tokens/trained", "Trained response tokens.", is_added=True),
    Family("quatro_step_seconds", "time/step_s", "Time since the step before."),
    Family("quatro_weight_sync_pause_seconds", "time/weight_sync_pause_s", "Pause of the engines in a weight update."),
    Family("quatro_weight_sync_transfer_seconds", "time/weight_sync_transfer_s", "Transfer of the weights."),
    Family("quatro_time_share", "time_share/{role}/{state}", "Share of each state in the time of a role."),
    Family("quatro_trained_tokens_per_second", "throughput/trained_tokens_per_s", "Trained tokens a second."),
    Family("quatro_generated_tokens_per_second", "throughput/generated_tokens_per_s", "Generated tokens a second."),
    Family("quatro_rollouts_per_second", "throughput/rollouts_per_s", "Trained responses a second."),
    Family("quatro_buffer_groups", "buffer/size", "Groups that are ready and wait for the learner."),
    Family("quatro_buffer_age_seconds", "buffer/age_s_mean", "Time from admission to training, mean of the batch."),
    Family("quatro_buffer_wait_seconds", "buffer/wait_s_mean", "Part of that time spent in the buffer."),
    Family("quatro_engines", "health/engines", "Engines that work."),
    Family("quatro_losses_total", "health/{what}", "Losses and restarts since the run began."),
)
OF_EVALUATIONS = (
    Family("quatro_evaluation_pass_at", "eval/{set}/pass_at_{k}", "pass@k of a held-out set."),
    Family("quatro_evaluation_majority", "eval/{set}/majority", "maj@n of a held-out set."),
    Family("quatro_evaluation_reward_mean", "eval/{set}/mean_reward", "Reward of a held-out set."),
    Family("quatro_evaluation_truncated_share", "eval/{set}/truncated_share", "Share that a limit ended."),
)
FAMILIES = (STEP, NUM_STEPS, LAST_STEP, *OF_STEPS, *OF_EVALUATIONS, EVENTS, MAX_STALENESS, NUM_ENGINES)


class Series(NamedTuple):
    """One series: the family's name, and the values of its labels in their order."""

    name: str
    labels: tuple[str, ...] = ()


@lru_cache(maxsize=4096)  # each step has the same names
def series_of(metric: str) -> Series | None:
    """Return the series of a metric of metrics.jsonl, or None if Prometheus does not get it; the first match counts."""
    for family in (*OF_STEPS, *OF_EVALUATIONS):
        if found := family.pattern.fullmatch(metric):
            return Series(family.name, found.groups())
    return None


def numbers(metrics: Mapping[str, object]) -> Iterator[tuple[str, float]]:
    """Yield the finite numbers among the metrics of a step, and the means of lists, which have a value per query."""
    for name, value in metrics.items():
        if isinstance(value, list) and value and all(isinstance(one, float) for one in value):
            value = fmean(value)
        if isinstance(value, int | float) and math.isfinite(value):
            yield name, float(value)
