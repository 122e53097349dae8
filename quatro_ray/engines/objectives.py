"""What a step optimises: how advantages are made from a batch, and the per-token loss.

One class a method, chosen by `objective.kind`. Shape letters: Q queries, G rollouts, N tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from quatro_ray.config import GrpoConfig, ObjectiveConfig, QuatroConfig
from quatro_ray.ops import advantages, importance, losses
from quatro_ray.ops.trust_region import Status


@dataclass(frozen=True)
class TokenBatch:
    """What a per-token loss may look at; all [N]. `advantage` is that of the token's rollout."""

    policy_logprobs: Tensor
    behavior_logprobs: Tensor
    advantage: Tensor
    is_response: Tensor
    rollout_index: Tensor
    num_cells: int


class Objective(Protocol):
    needs_sequence_ratio: bool
    """Whether advantages depend on log ρ of whole rollouts, which takes a pass before the gradient."""

    def advantages(self, rewards: Tensor, valid: Tensor, sequence_log_ratio: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """[Q, G] each → advantage [Q, G], and values per query for the diagnostics."""
        ...

    def token_loss(self, batch: TokenBatch) -> Tensor:
        """[N], not normalised."""
        ...


class Quatro:
    needs_sequence_ratio = True

    def __init__(self, config: QuatroConfig) -> None:
        self._config = config

    def advantages(self, rewards: Tensor, valid: Tensor, sequence_log_ratio: Tensor) -> tuple[Tensor, dict[str, Any]]:
        config = self._config
        result = advantages.quatro(
            rewards,
            valid,
            sequence_log_ratio,
            kl_budget_nats=config.kl_budget_nats,
            max_eta=config.max_eta,
            stabilizer=config.stabilizer,
        )
        solution = result.solution
        informative = solution.status != int(Status.VOID)
        diagnostics = {
            "trust_region/kl_budget_nats": config.kl_budget_nats,
            "trust_region/lambda": (1 / solution.eta)[informative].tolist(),
            "trust_region/target_kl_nats": solution.kl_nats.tolist(),
            "trust_region/status": [float(s) for s in solution.status],
        }
        return result.advantage, diagnostics

    def token_loss(self, batch: TokenBatch) -> Tensor:
        log_ratio = (batch.policy_logprobs.detach() - batch.behavior_logprobs) * batch.is_response
        weight = importance.weights(
            self._config.importance.level,
            self._config.importance.truncation,
            log_ratio,
            batch.is_response,
            batch.rollout_index,
            batch.num_cells,
        )
        return losses.quatro(batch.policy_logprobs, batch.advantage, weight)


class Grpo:
    needs_sequence_ratio = False

    def __init__(self, config: GrpoConfig) -> None:
        self._config = config

    def advantages(self, rewards: Tensor, valid: Tensor, sequence_log_ratio: Tensor) -> tuple[Tensor, dict[str, Any]]:
        return advantages.group_normalised(rewards, valid), {}

    def token_loss(self, batch: TokenBatch) -> Tensor:
        clip = self._config
        return losses.grpo(
            batch.policy_logprobs,
            batch.behavior_logprobs,
            batch.advantage,
            clip_low=clip.clip_low,
            clip_high=clip.clip_high,
        )


def make_objective(config: ObjectiveConfig) -> Objective:
    return Quatro(config) if isinstance(config, QuatroConfig) else Grpo(config)
