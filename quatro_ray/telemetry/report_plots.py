"""The plots of a report, by section."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from quatro_ray.telemetry import plots
from quatro_ray.telemetry.plots import largest, lines, mean, scalar
from quatro_ray.telemetry.record_types import number, weighted_mean
from quatro_ray.telemetry.run_files import Record, RunFiles

_PHASES = ("wait", "train", "sync", "evaluate", "export", "checkpoint")
_ROLES = {
    "learner": "Where the learner's time went",
    "generators": "Where the engines' time went",
    "verifiers": "Where the verifiers' time went",
    "evaluator": "Where the time of dedicated evaluation went",
}


def sections(run: RunFiles) -> list[tuple[str, list[str]]]:
    """Return title and plots of each section. What the run has no data for is left out."""
    m = run.metrics
    made = [
        ("Results", _results(run)),
        ("Lengths and drops", _lengths_and_drops(m)),
        ("Policy", _policy(m)),
        ("Trust region", _trust_region(m)),
        ("Off-policy data and weights", _off_policy(m)),
        ("Speed", _speed(run)),
    ]
    return [(title, drawn) for title, found in made if (drawn := [plot for plot in found if plot])]


def _results(run: RunFiles) -> list[str | None]:
    m = run.metrics
    return [
        lines("Reward of the trained batch", m, {"mean reward": scalar("reward/mean")}),
        plots.pass_rates("Held-out questions", run.evaluations),
        lines(
            "Spread of rewards: standard deviation over the batch, and mean of that within groups",
            m,
            {"batch": scalar("reward/std"), "within groups": scalar("reward/group_std_mean")},
        ),
        lines("Reward by source", m, _by_name(m, "reward/source_")),
        lines("Pass rate of trained groups by source", m, _by_name(m, "pass_rate/source_"), scale="share"),
        lines("Parts of the reward, before their weights", m, _by_name(m, "reward/part_")),
        lines(
            "Share of groups whose responses all have the same reward, and of truncated responses",
            m,
            {"one reward": scalar("reward/frac_zero_std"), "truncated": scalar("rollout/truncated_share")},
            scale="share",
        ),
    ]


def _lengths_and_drops(m: Sequence[Record]) -> list[str | None]:
    response = _sum_of_counts(m, "rollout/response_tokens_histogram")
    prompt = _sum_of_counts(m, "rollout/prompt_tokens_histogram")
    drops = {reason: _count(f"drops/{reason}") for reason in _reasons(m)}
    lengths, pass_rates = _of_drops(m, "response_tokens_mean"), _of_drops(m, "pass_rate")
    return [
        lines("Response length", m, _mean_and_max("rollout/response_tokens"), "tokens", scale="from_zero"),
        lines("Prompt length", m, _mean_and_max("rollout/prompt_tokens"), "tokens", scale="from_zero"),
        plots.lengths("Responses that were trained, by length", response),
        plots.lengths("Prompts that were trained, by length", prompt),
        lines("Dropped groups by reason", m, drops, "groups since the step before", scale="from_zero"),
        plots.categories("Mean response length: trained against dropped", lengths, "tokens"),
        plots.categories("Pass rate: trained against dropped", pass_rates, "share correct", scale="share"),
    ]


def _policy(m: Sequence[Record]) -> list[str | None]:
    return [
        lines("Entropy", m, {"entropy": scalar("policy/entropy")}, "nats per token"),
        lines("Gradient norm", m, {"gradient norm": scalar("step/grad_norm")}),
        lines("Learning rate", m, {"learning rate": scalar("step/learning_rate")}),
        lines("KL to the reference policy", m, {"KL": scalar("policy/reference_kl")}, "nats per token"),
    ]


def _trust_region(m: Sequence[Record]) -> list[str | None]:
    drift = {
        "drift, mean": mean("policy/realised_kl_nats"),
        "drift, largest": largest("policy/realised_kl_nats"),
    }
    control = {"share of budget": scalar("step_control/share_of_budget"), "kept": scalar("step_control/kept")}
    bound_by = {name: scalar(f"trust_region/frac_{name}") for name in ("active", "slack", "void")}
    return [
        lines("Drift since sampling, per query", m, drift, "nats a response", scale="log"),
        lines("Step control: KL of the optimiser's step over its budget, and what was kept", m, control),
        lines("Queries by what bound their trust region", m, bound_by, scale="share"),
        plots.histogram("Targets t", _flat(m, "trust_region/target_log_ratio"), "log π*/β, nats"),
        plots.histogram("η of informative queries", _flat(m, "trust_region/eta"), "1/λ, 1/reward"),
    ]


def _off_policy(m: Sequence[Record]) -> list[str | None]:
    effective = {
        "effective share of responses": scalar("rollout_corr/eff_sample_size"),
        "effective share of tokens": scalar("rollout_corr/token_eff_sample_size"),
        "limited share": scalar("policy_gradient/limited_share"),
    }
    agreement = {
        "fixed sequences": scalar("weight_sync/logprob_abs_diff"),
        "trained tokens of the same version": scalar("rollout_corr/logprob_abs_diff"),
    }
    staleness = {"mean": scalar("off_policy/staleness_mean"), "largest": scalar("off_policy/staleness_max")}
    return [
        lines("Staleness of trained tokens over time", m, staleness, "optimiser steps", scale="from_zero"),
        plots.bars(
            "Staleness of trained tokens",
            _sum_of_counts(m, "off_policy/staleness_tokens"),
            "learner version − token version",
            "tokens",
        ),
        lines(
            "Effective sample size of the batch, and tokens limited by clip, cut or mask", m, effective, scale="share"
        ),
        plots.ratios("Importance ratios of trained tokens", m),
        lines("Log-probs of engine and learner under the same weights", m, agreement, "nats apart", scale="log"),
    ]


def _speed(run: RunFiles) -> list[str | None]:
    m = run.metrics
    durations = {"step": scalar("time/step_s")} | {name: scalar(f"time/{name}_s") for name in _PHASES}
    rates = {
        "trained": scalar("throughput/trained_tokens_per_s"),
        "generated": scalar("throughput/generated_tokens_per_s"),
    }
    sync = {"engines paused": scalar("time/weight_sync_pause_s"), "transfer": scalar("time/weight_sync_transfer_s")}
    return [
        lines("Duration of a step, and of the learner's phases in it", m, durations, "seconds", scale="from_zero"),
        *(plots.stacked(title, m, f"time_share/{role}/") for role, title in _ROLES.items()),
        lines("Tokens a second", m, rates, scale="from_zero"),
        lines("Trained rollouts a second", m, {"rollouts": scalar("throughput/rollouts_per_s")}, scale="from_zero"),
        lines("Weight update", m, sync, "seconds", scale="from_zero"),
        plots.timeline("What learner and generators were doing", run.timeline),
    ]


def _by_name(m: Sequence[Record], prefix: str) -> dict[str, plots.Get]:
    names = dict.fromkeys(key.removeprefix(prefix) for step in m for key in step if key.startswith(prefix))
    return {name: scalar(prefix + name) for name in names}


def _mean_and_max(key: str) -> dict[str, plots.Get]:
    return {"mean": scalar(f"{key}_mean"), "longest": scalar(f"{key}_max")}


def _count(key: str) -> plots.Get:
    """Return a reader of a count, which a step lacks if nothing happened."""
    return lambda m: number(m, key) or 0.0


def _reasons(m: Sequence[Record]) -> list[str]:
    """Return the reasons for which groups were dropped: drops/REASON, next to drops/REASON_pass_rate and the like."""
    names = dict.fromkeys(key.removeprefix("drops/") for step in m for key in step if key.startswith("drops/"))
    return [name for name in names if not name.endswith(("_response_tokens_mean", "_pass_rate"))]


def _of_drops(m: Sequence[Record], key: str) -> dict[str, float]:
    """Return a mean over all trained groups and over the dropped ones by reason; empty if no group was dropped."""
    found = {r: weighted_mean(m, f"drops/{r}_{key}", f"drops/{r}") for r in _reasons(m)}
    dropped = {f"dropped: {reason}": value for reason, value in found.items() if value is not None}
    of_trained = "pass_rate/mean" if key == "pass_rate" else f"rollout/{key}"
    trained = weighted_mean(m, of_trained, "rollout/num")
    return {"trained": trained, **dropped} if dropped and trained is not None else {}


def _sum_of_counts(m: Sequence[Record], key: str) -> Counter[int]:
    total: Counter[int] = Counter()
    for step in m:
        total.update({int(k): int(n) for k, n in (step.get(key) or {}).items()})
    return total


def _flat(m: Sequence[Record], key: str) -> Iterator[float]:
    return (value for step in m for value in step.get(key) or ())
