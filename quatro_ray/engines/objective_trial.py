"""The program that tries the user's own loss and advantage: `python -m quatro_ray.engines.objective_trial`.

It reads the `objective` section as JSON and answers with the first problem. Its answer goes to the original standard
output; what the user's code prints goes to standard error. Shape letters: Q queries, G rollouts of a query, N tokens.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from quatro_ray.config import UserObjectiveConfig
from quatro_ray.engines.batches import MicroBatchTensors, Prepared, StepBatch, TokenBatch, make_token_batch
from quatro_ray.engines.user_objective import UserAdvantage, UserLoss, load_user_functions
from quatro_ray.errors import ConfigError, ObjectiveError, QuatroError
from quatro_ray.isolation.user_function import failure_line

_REWARDS = ((1.0, 0.0, 0.0, 1.0), (0.0, 0.0, 0.0, 0.0), (0.25, 0.5, 0.0, 0.0))
_ADVANTAGES = ((1.0, -1.0, -0.5, 0.5), (0.0, 0.0, 0.0, 0.0), (0.1, 2.0, -0.7, -1.4))
_NUM_CELLS = 12
_PROMPT_TOKENS = 2
_PADDING = 3


def problem_of(config: UserObjectiveConfig) -> str | None:
    """Return why the functions of a configuration are refused, or None."""
    try:
        loss, advantage = load_user_functions(config)
        if advantage is not None:
            _try_advantage(advantage, config)
        _try_loss(loss, f"objective.loss={config.loss!r}")
    except QuatroError as error:
        return str(error)
    return None


def _try_advantage(advantage: UserAdvantage, config: UserObjectiveConfig) -> None:
    for what, batch in _step_batches(needs_log_ratio=config.needs_log_ratio):
        try:
            first, second = advantage(batch), advantage(batch)
        except ObjectiveError as error:
            raise ConfigError(f"{error} (it was called on a made-up batch {what})") from error
        if not torch.equal(first, second):
            raise ConfigError(
                f"objective.advantage={config.advantage!r} returned other values when it was called again with the "
                "same batch, but every learner rank computes it for itself and all must agree; remove what is random "
                "or kept between calls"
            )


def _try_loss(loss: UserLoss, name: str) -> None:
    row = _row()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        drift = 0.05 * torch.randn(len(row.behavior_logprobs))
    policy = row.behavior_logprobs + drift * (row.staleness > 0)  # fresh tokens are as likely as when sampled
    policy.requires_grad_()
    batch = _tokens(row, policy)
    try:
        per_token, _ = loss(batch)
    except ObjectiveError as error:
        raise ConfigError(f"{error} (it was called on a made-up micro-batch)") from error
    _refuse_non_finite(per_token.detach(), "loss", batch, name)
    try:
        (gradient,) = torch.autograd.grad(per_token[batch.is_response].sum(), policy, allow_unused=True)
    except RuntimeError as error:
        raise ConfigError(f"{name}: its gradient {failure_line(error)}; correct the function") from error
    if gradient is None or not gradient.any():
        raise ConfigError(
            f"{name}: its gradient is zero for every token of a made-up micro-batch with advantages of both signs, but "
            "must move the policy; compute the loss from batch.policy_logprobs and batch.advantage without detach()"
        )
    _refuse_non_finite(gradient, "gradient", batch, name)
    _refuse_dependence(loss, row, policy, per_token.detach(), name)


def _refuse_non_finite(values: Tensor, what: str, batch: TokenBatch, name: str) -> None:
    """Refuse values, [N], that are not finite, padding and prompts included, because 0 · NaN is NaN."""
    wrong = (~values.isfinite()).nonzero().flatten()
    if not len(wrong):
        return
    i, policy = int(wrong[0]), batch.policy_logprobs.detach()
    kind = "a response" if batch.is_response[i] else "a prompt" if batch.rollout_index[i] >= 0 else "padding"
    raise ConfigError(
        f"{name}: the {what} of a token of {kind} is {float(values[i])} (policy_logprobs "
        f"{float(policy[i]):.3g}, behavior_logprobs {float(batch.behavior_logprobs[i]):.3g}, advantage "
        f"{float(batch.advantage[i]):.3g}), but must be finite at every token, also outside responses; correct the "
        "function"
    )


def _refuse_dependence(loss: UserLoss, row: MicroBatchTensors, policy: Tensor, whole: Tensor, name: str) -> None:
    """Refuse a loss whose tokens depend on the other rollouts of the micro-batch, which the packing decides."""
    for part in (row.rollout_index < _NUM_CELLS // 2, row.rollout_index >= _NUM_CELLS // 2):
        inside = part & (row.rollout_index >= 0)
        alone, _ = loss(_tokens(row.select(inside), policy[inside]))
        counted = row.is_response[inside]
        if not torch.allclose(alone.detach()[counted], whole[inside][counted], rtol=1e-3, atol=1e-6):
            raise ConfigError(
                f"{name}: the loss of a token changed with the other rollouts in its micro-batch, which the packing "
                "decides, but must depend on its own rollout alone; compute what spans rollouts in objective.advantage "
                "and leave averages to learner.loss_agg_mode"
            )


def _step_batches(*, needs_log_ratio: bool) -> Iterator[tuple[str, StepBatch]]:
    """Yield batches of Q = 3, G = 4, where one group has three rollouts, and what is special of each."""
    rewards = torch.tensor(_REWARDS, dtype=torch.float64)
    index = _lengths_index()
    log_ratio = 0.05 * torch.cos(torch.arange(len(index), dtype=torch.float64))
    batch = StepBatch(
        rewards=rewards,
        valid=_valid(),
        rollout_index=index,
        staleness=index % 4,
        log_ratio=log_ratio if needs_log_ratio else None,
    )
    yield "in which the rewards of one group are all equal", batch
    yield "in which all rewards are equal", replace(batch, rewards=torch.ones_like(rewards) * batch.valid)


def _valid() -> Tensor:
    valid = torch.ones(3, 4, dtype=torch.bool)
    valid[1, 3] = False
    return valid


def _lengths_index() -> Tensor:
    """Return the cell of every response token, int64 [M]: rollouts of 1 to 4 tokens in the cells that are valid."""
    cells = _valid().flatten().nonzero().flatten()
    return cells.repeat_interleave(1 + cells % 4)


def _row() -> MicroBatchTensors:
    """Return a packed row: prompt and response of each rollout, then padding."""
    index = _lengths_index()
    cells, lengths = index.unique(return_counts=True)
    cell = torch.cat([cells.repeat_interleave(lengths + _PROMPT_TOKENS), torch.full((_PADDING,), -1)])
    position = torch.cat([torch.arange(int(n) + _PROMPT_TOKENS) for n in lengths] + [torch.arange(_PADDING)])
    is_response = (position >= _PROMPT_TOKENS) & (cell >= 0)
    behavior = torch.where(is_response, -0.1 - 0.3 * position, 0.0)
    return MicroBatchTensors(
        token_ids=position + 1,
        position_ids=position,
        target_ids=torch.where(is_response, position + 2, 0),
        is_response=is_response,
        rollout_index=cell,
        behavior_logprobs=behavior.float(),
        staleness=torch.where(is_response, cell % 4, 0),
    )


def _tokens(row: MicroBatchTensors, policy: Tensor) -> TokenBatch:
    return make_token_batch(row, policy, Prepared(torch.tensor(_ADVANTAGES, dtype=torch.float64)))


def main() -> None:
    """Answer one request."""
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    config = UserObjectiveConfig.model_validate_json(sys.stdin.read())
    try:
        problem = problem_of(config)
    except SystemExit as error:
        problem = f"objective: the functions of {config.loss!r} called exit({error.code}); correct them"
    answer.write(json.dumps({"problem": problem}))
    answer.flush()


if __name__ == "__main__":
    main()
