"""What a step optimises: how advantages are made from a batch, and the per-token loss.

One class a method, chosen by `objective.kind`. Shape letters: Q queries, G rollouts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from quatro_ray import config as c
from quatro_ray.algorithms import advantages, losses
from quatro_ray.algorithms.aggregation import AggregationMode
from quatro_ray.algorithms.kl_budget import kl_budget
from quatro_ray.algorithms.losses import TokenLoss
from quatro_ray.algorithms.trust_region import Status
from quatro_ray.engines.batches import StepBatch, TokenBatch


@dataclass(frozen=True)
class Prepared:
    """`advantage` [Q, G]; `constant`: one number that the token loss needs; diagnostics: values per query."""

    advantage: Tensor
    constant: float = 0.0
    diagnostics: dict[str, Any] = field(default_factory=dict)


class Objective:
    """GRPO's advantage, and no wish to see log-ratios beforehand; methods override what they do otherwise."""

    needs_log_ratio = False
    """Whether `prepare` reads StepBatch.log_ratio, which takes a pass before the gradient."""
    loss_agg_mode: AggregationMode = "token_mean"
    """Of the paper, where the configuration names none."""

    def prepare(self, batch: StepBatch) -> Prepared:
        return Prepared(advantages.group_normalised(batch.rewards, batch.valid))

    def token_loss(self, t: TokenBatch, constant: float) -> TokenLoss:
        raise NotImplementedError


class Quatro(Objective):
    needs_log_ratio = True

    def __init__(self, config: c.QuatroConfig) -> None:
        self._config = config

    def prepare(self, batch: StepBatch) -> Prepared:
        config = self._config
        log_ratio = batch.sequence_log_ratio()
        budget = kl_budget(
            config.kl_budget_nats,
            unit=config.kl_budget_unit,
            staleness_exponent=config.staleness_exponent,
            shrink_by_ess=config.shrink_by_ess,
            headroom_exponent=config.headroom_exponent,
            rewards=batch.rewards,
            lengths=batch.lengths(),
            staleness=batch.query_staleness(),
            sequence_log_ratio=log_ratio,
            valid=batch.valid,
        )
        max_eta: Tensor | float = config.max_eta
        if config.eta_cap == "first_order":
            max_eta = advantages.first_order_eta(batch.rewards, batch.valid, budget, config.max_eta)
        result = advantages.quatro(
            batch.rewards,
            batch.valid,
            log_ratio,
            kl_budget_nats=budget,
            max_eta=max_eta,
            stabilizer=config.stabilizer,
        )
        solution = result.solution
        informative = solution.status != int(Status.VOID)
        diagnostics: dict[str, Any] = {
            "trust_region/kl_budget_nats": budget.tolist(),
            "trust_region/eta": solution.eta[informative].tolist(),
            "trust_region/lambda": (1 / solution.eta)[informative].tolist(),
            "trust_region/target_kl_nats": solution.kl_nats.tolist(),
            "trust_region/target_log_ratio": solution.target_log_ratio[batch.valid & informative[:, None]].tolist(),
            "trust_region/residual": result.advantage[batch.valid].tolist(),
        }
        for status in Status:
            share = (solution.status == int(status)).double().mean()
            diagnostics[f"trust_region/frac_{status.name.lower()}"] = float(share)
        return Prepared(result.advantage, diagnostics=diagnostics)

    def token_loss(self, t: TokenBatch, constant: float) -> TokenLoss:
        config = self._config.importance
        return losses.quatro(
            t.policy_logprobs, t.advantage, t.log_ratio(config.level).detach(), truncation=config.truncation
        )


class Grpo(Objective):
    loss_agg_mode: AggregationMode = "seq_mean_token_mean"

    def __init__(self, config: c.GrpoConfig | c.DrGrpoConfig | c.DapoConfig) -> None:
        self._clip = {"clip_low": config.clip_low, "clip_high": config.clip_high}

    def token_loss(self, t: TokenBatch, constant: float) -> TokenLoss:
        return losses.clipped(t.log_ratio(), t.advantage, **self._clip)


class DrGrpo(Grpo):
    loss_agg_mode: AggregationMode = "seq_mean_token_sum_norm"

    def prepare(self, batch: StepBatch) -> Prepared:
        return Prepared(advantages.group_centred(batch.rewards, batch.valid))


class Dapo(Grpo):
    loss_agg_mode: AggregationMode = "token_mean"


class Gspo(Objective):
    loss_agg_mode: AggregationMode = "seq_mean_token_mean"

    def __init__(self, config: c.GspoConfig) -> None:
        self._config = config

    def token_loss(self, t: TokenBatch, constant: float) -> TokenLoss:
        clip = self._config
        ratio = t.log_ratio("geometric")
        return losses.gspo(t.policy_logprobs, ratio, t.advantage, clip_low=clip.clip_low, clip_high=clip.clip_high)


class Cispo(Objective):
    def __init__(self, config: c.CispoConfig) -> None:
        self._upper = config.weight_upper

    def token_loss(self, t: TokenBatch, constant: float) -> TokenLoss:
        return losses.cispo(t.policy_logprobs, t.behavior_logprobs, t.advantage, upper=self._upper)


class DecoupledPpo(Objective):
    def __init__(self, config: c.DecoupledPpoConfig) -> None:
        self._config = config

    def token_loss(self, t: TokenBatch, constant: float) -> TokenLoss:
        config = self._config
        proximal = t.proximal_logprobs
        if config.proximal == "interpolated":
            proximal = losses.interpolated_proximal(t.behavior_logprobs, proximal, t.staleness)
        return losses.decoupled_ppo(
            t.policy_logprobs,
            proximal,
            t.behavior_logprobs,
            t.advantage,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            weight_cap=config.weight_cap,
        )


class TisGrpo(Objective):
    def __init__(self, config: c.TisGrpoConfig) -> None:
        self._config = config

    def token_loss(self, t: TokenBatch, constant: float) -> TokenLoss:
        config = self._config
        return losses.tis_grpo(
            t.policy_logprobs,
            t.proximal_logprobs,
            t.log_ratio(config.importance.level),
            t.advantage,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            truncation=config.importance.truncation,
        )


class MisGrpo(Objective):
    def __init__(self, config: c.MisGrpoConfig) -> None:
        self._config = config

    def token_loss(self, t: TokenBatch, constant: float) -> TokenLoss:
        config = self._config
        return losses.mis_grpo(
            t.policy_logprobs,
            t.proximal_logprobs,
            t.log_ratio(config.level),
            t.advantage,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            mask_low=config.mask_low,
            mask_high=config.mask_high,
        )


class M2po(Objective):
    needs_log_ratio = True

    def __init__(self, config: c.M2poConfig) -> None:
        self._tau = config.tau

    def prepare(self, batch: StepBatch) -> Prepared:
        advantage = advantages.group_normalised(batch.rewards, batch.valid)
        assert batch.log_ratio is not None
        of_token = advantage.flatten()[batch.rollout_index]
        return Prepared(advantage, constant=losses.m2_threshold(batch.log_ratio, of_token, self._tau))

    def token_loss(self, t: TokenBatch, constant: float) -> TokenLoss:
        return losses.m2po(t.policy_logprobs, t.behavior_logprobs, t.advantage, log_ratio_threshold=constant)


class Sapo(Objective):
    loss_agg_mode: AggregationMode = "seq_mean_token_mean"

    def __init__(self, config: c.SapoConfig) -> None:
        self._tau = {"tau_positive": config.tau_positive, "tau_negative": config.tau_negative}

    def token_loss(self, t: TokenBatch, constant: float) -> TokenLoss:
        return losses.sapo(t.policy_logprobs, t.behavior_logprobs, t.advantage, **self._tau)


class Reinforce(Objective):
    def __init__(self, config: c.ReinforceConfig) -> None:
        self._config = config.importance

    def prepare(self, batch: StepBatch) -> Prepared:
        return Prepared(advantages.group_centred(batch.rewards, batch.valid))

    def token_loss(self, t: TokenBatch, constant: float) -> TokenLoss:
        config = self._config
        return losses.reinforce(t.policy_logprobs, t.log_ratio(config.level), t.advantage, truncation=config.truncation)


OBJECTIVES: dict[str, Any] = {
    "quatro": Quatro,
    "grpo": Grpo,
    "dr_grpo": DrGrpo,
    "dapo": Dapo,
    "gspo": Gspo,
    "cispo": Cispo,
    "decoupled_ppo": DecoupledPpo,
    "tis_grpo": TisGrpo,
    "mis_grpo": MisGrpo,
    "m2po": M2po,
    "sapo": Sapo,
    "reinforce": Reinforce,
}


def make_objective(config: c.ObjectiveConfig) -> Objective:
    return OBJECTIVES[config.kind](config)
