"""Objectives: how a method turns a batch into advantages, and its loss per token.

Each method is one function that builds an `Objective` from its section of the configuration; OBJECTIVES lists them by
`objective.kind`. Shape letters: Q queries, G rollouts of a query, N tokens of a micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from quatro_ray import config as c
from quatro_ray.algorithms import advantages, losses
from quatro_ray.algorithms.aggregation import AggregationMode
from quatro_ray.algorithms.losses import TokenLoss
from quatro_ray.algorithms.trust_region import Solution, Status
from quatro_ray.engines.batches import Prepared, StepBatch, TokenBatch
from quatro_ray.engines.user_objective import load_user_functions
from quatro_ray.types import StepMetrics


def _group_normalised(batch: StepBatch) -> Prepared:
    return Prepared(advantages.group_normalised(batch.rewards, batch.valid))


def _group_centred(batch: StepBatch) -> Prepared:
    return Prepared(advantages.group_centred(batch.rewards, batch.valid))


@dataclass(frozen=True)
class Objective:
    """One method: its advantages, its loss, and how the loss is averaged.

    Attributes:
        token_loss: maps the tokens of a micro-batch and `Prepared.constant` to losses [N], not normalised.
        prepare: maps the global batch to advantages; GRPO's if a method has none of its own.
        needs_log_ratio: whether `prepare` reads StepBatch.log_ratio, which costs one more forward pass.
        loss_agg_mode: aggregation of the paper, used unless learner.loss_agg_mode names another.
    """

    token_loss: Callable[[TokenBatch, float], TokenLoss]
    prepare: Callable[[StepBatch], Prepared] = _group_normalised
    needs_log_ratio: bool = False
    loss_agg_mode: AggregationMode = "token_mean"


def quatro(config: c.QuatroConfig) -> Objective:
    """Build QUATRO (arXiv 2602.04620): targets of each query's trust region, a mask, and truncated weights."""

    def prepare(batch: StepBatch) -> Prepared:
        result = advantages.quatro(batch.rewards, batch.valid, tilt_share=config.tilt_share)
        return Prepared(result.advantage, diagnostics=_trust_region_metrics(result.solution, batch.valid))

    def loss(t: TokenBatch, _: float) -> TokenLoss:
        return losses.quatro(
            t.policy_logprobs,
            t.behavior_logprobs,
            t.advantage,
            t.log_ratio(config.importance.level),
            max_shift=config.max_token_shift,
            truncation=config.importance.truncation,
        )

    return Objective(loss, prepare, loss_agg_mode="prompt_mean")


def _trust_region_metrics(solution: Solution, valid: Tensor) -> StepMetrics:
    """Args: valid: bool [Q, G]."""
    informative = solution.status != int(Status.VOID)
    metrics: StepMetrics = {
        "trust_region/eta": solution.eta[informative].tolist(),
        "trust_region/lambda": (1 / solution.eta)[informative].tolist(),
        "trust_region/target_kl_nats": solution.kl_nats[informative].tolist(),
        "trust_region/target_log_ratio": solution.target_log_ratio[valid & informative[:, None]].tolist(),
    }
    for status in Status:
        share = (solution.status == int(status)).double().mean()
        metrics[f"trust_region/frac_{status.name.lower()}"] = float(share)
    return metrics


def _clipped(config: c.GrpoConfig | c.DrGrpoConfig | c.DapoConfig) -> Callable[[TokenBatch, float], TokenLoss]:
    """Return the loss that GRPO, Dr. GRPO and DAPO share."""

    def loss(t: TokenBatch, _: float) -> TokenLoss:
        return losses.clipped(
            t.log_ratio(),
            t.advantage,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            dual_clip=config.dual_clip,
        )

    return loss


def grpo(config: c.GrpoConfig) -> Objective:
    """Build GRPO (arXiv 2402.03300): group-normalised advantages, clipped ratios, and a mean over each response."""
    return Objective(_clipped(config), loss_agg_mode="seq_mean_token_mean")


def dr_grpo(config: c.DrGrpoConfig) -> Objective:
    """Build Dr. GRPO (arXiv 2503.20783): GRPO without division by the group's std or by response lengths."""
    return Objective(_clipped(config), prepare=_group_centred, loss_agg_mode="seq_mean_token_sum_norm")


def dapo(config: c.DapoConfig) -> Objective:
    """Build DAPO (arXiv 2503.14476): GRPO's advantages and clipped ratios, with a mean over all tokens."""
    return Objective(_clipped(config))


def gspo(config: c.GspoConfig) -> Objective:
    """Build GSPO (arXiv 2507.18071): GRPO's advantages, and a clip of the length-normalised ratio of each response."""

    def loss(t: TokenBatch, _: float) -> TokenLoss:
        ratio = t.log_ratio("geometric")
        return losses.gspo(t.policy_logprobs, ratio, t.advantage, clip_low=config.clip_low, clip_high=config.clip_high)

    return Objective(loss, loss_agg_mode="seq_mean_token_mean")


def cispo(config: c.CispoConfig) -> Objective:
    """Build CISPO (arXiv 2506.13585): GRPO's advantages, and truncated weights in place of a clip."""

    def loss(t: TokenBatch, _: float) -> TokenLoss:
        return losses.cispo(t.policy_logprobs, t.behavior_logprobs, t.advantage, upper=config.weight_upper)

    return Objective(loss)


def decoupled_ppo(config: c.DecoupledPpoConfig) -> Objective:
    """Build decoupled PPO (AReaL, arXiv 2505.24298): a clip around a proximal policy, weighted by π_prox/β."""

    def loss(t: TokenBatch, _: float) -> TokenLoss:
        proximal = t.proximal_logprobs
        if config.proximal == "interpolated":
            proximal = losses.interpolated_proximal(t.behavior_logprobs, t.policy_logprobs, t.staleness)
        return losses.decoupled_ppo(
            t.policy_logprobs,
            proximal,
            t.behavior_logprobs,
            t.advantage,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            weight_cap=config.weight_cap,
            dual_clip=config.dual_clip,
        )

    return Objective(loss)


def tis_grpo(config: c.TisGrpoConfig) -> Objective:
    """Build GRPO with truncated importance weights (TIS, Yao et al. 2025)."""

    def loss(t: TokenBatch, _: float) -> TokenLoss:
        return losses.tis_grpo(
            t.policy_logprobs,
            t.proximal_logprobs,
            t.log_ratio(config.importance.level),
            t.advantage,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            truncation=config.importance.truncation,
            dual_clip=config.dual_clip,
        )

    return Objective(loss)


def mis_grpo(config: c.MisGrpoConfig) -> Objective:
    """Build GRPO with masked importance weights (MIS, Liu et al. 2025)."""

    def loss(t: TokenBatch, _: float) -> TokenLoss:
        return losses.mis_grpo(
            t.policy_logprobs,
            t.proximal_logprobs,
            t.log_ratio(config.level),
            t.advantage,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            mask_low=config.mask_low,
            mask_high=config.mask_high,
            dual_clip=config.dual_clip,
        )

    return Objective(loss)


def m2po(config: c.M2poConfig) -> Objective:
    """Build M2PO (arXiv 2510.01161): a mask whose threshold is computed once per step, from the global batch."""

    def prepare(batch: StepBatch) -> Prepared:
        assert batch.log_ratio is not None
        advantage = advantages.group_normalised(batch.rewards, batch.valid)
        of_token = advantage.flatten()[batch.rollout_index]
        return Prepared(advantage, constant=losses.m2_threshold(batch.log_ratio, of_token, config.tau))

    def loss(t: TokenBatch, threshold: float) -> TokenLoss:
        return losses.m2po(
            t.policy_logprobs,
            t.behavior_logprobs,
            t.advantage,
            log_ratio_threshold=threshold,
            dual_clip=config.dual_clip,
        )

    return Objective(loss, prepare=prepare, needs_log_ratio=True)


def sapo(config: c.SapoConfig) -> Objective:
    """Build SAPO (arXiv 2511.20347): GRPO's advantages, and a soft gate in place of a clip."""

    def loss(t: TokenBatch, _: float) -> TokenLoss:
        return losses.sapo(
            t.policy_logprobs,
            t.behavior_logprobs,
            t.advantage,
            tau_positive=config.tau_positive,
            tau_negative=config.tau_negative,
        )

    return Objective(loss, loss_agg_mode="seq_mean_token_mean")


def dppo(config: c.DppoConfig) -> Objective:
    """Build DPPO (arXiv 2602.04879): advantages and normalisation of Dr. GRPO, and a mask by divergence from β."""
    threshold = config.threshold or {"tv": 0.15, "kl": 0.05}[config.divergence]

    def loss(t: TokenBatch, _: float) -> TokenLoss:
        return losses.dppo(
            t.policy_logprobs,
            t.behavior_logprobs,
            t.advantage,
            divergence=config.divergence,
            threshold=threshold,
            upper=config.weight_upper or math.inf,
        )

    return Objective(loss, prepare=_group_centred, loss_agg_mode="seq_mean_token_sum_norm")


def drpo(config: c.DrpoConfig) -> Objective:
    """Build DRPO (arXiv 2606.09821): advantages and normalisation of Dr. GRPO, and a regulariser in place of a mask."""

    def loss(t: TokenBatch, _: float) -> TokenLoss:
        return losses.drpo(
            t.policy_logprobs,
            t.behavior_logprobs,
            t.advantage,
            threshold=config.threshold,
            upper=config.weight_upper or math.inf,
        )

    return Objective(loss, prepare=_group_centred, loss_agg_mode="seq_mean_token_sum_norm")


def reinforce(config: c.ReinforceConfig) -> Objective:
    """Build REINFORCE (Williams 1992): the group's mean as baseline, and truncated importance weights."""
    importance = config.importance

    def loss(t: TokenBatch, _: float) -> TokenLoss:
        log_weight = t.log_ratio(importance.level)
        return losses.reinforce(t.policy_logprobs, log_weight, t.advantage, truncation=importance.truncation)

    return Objective(loss, prepare=_group_centred)


def user(config: c.UserObjectiveConfig) -> Objective:
    """Build the objective of the user's own functions; without an advantage of their own, it is GRPO's."""
    loss, advantage = load_user_functions(config)

    def prepare(batch: StepBatch) -> Prepared:
        return _group_normalised(batch) if advantage is None else Prepared(advantage(batch))

    def token_loss(t: TokenBatch, _: float) -> TokenLoss:
        return loss(t)

    return Objective(token_loss, prepare=prepare, needs_log_ratio=config.needs_log_ratio)


OBJECTIVES: dict[str, Callable[[Any], Objective]] = {
    "quatro": quatro,
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "dapo": dapo,
    "gspo": gspo,
    "cispo": cispo,
    "decoupled_ppo": decoupled_ppo,
    "tis_grpo": tis_grpo,
    "mis_grpo": mis_grpo,
    "m2po": m2po,
    "sapo": sapo,
    "dppo": dppo,
    "drpo": drpo,
    "reinforce": reinforce,
    "user": user,
}
"""One entry per member of the union ObjectiveConfig; the builder of a kind takes the configuration of that kind."""


def make_objective(config: c.ObjectiveConfig) -> Objective:
    """Build the method that `config.kind` names."""
    return OBJECTIVES[config.kind](config)
