"""The user's own loss and advantage: how they are loaded and called, and what they may return.

docs/algorithm.md describes them. Shape letters: Q queries, G rollouts of a query, N tokens of a micro-batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from quatro_ray.algorithms.losses import TokenLoss
from quatro_ray.config import UserObjectiveConfig
from quatro_ray.engines.batches import StepBatch, TokenBatch
from quatro_ray.errors import ConfigError, ObjectiveError
from quatro_ray.isolation.user_function import failure_line, load_function


class _UserFunction:
    """One function, called with a batch and those of `params` that it takes.

    Args:
        field: the field of the `objective` section that has the path.
        path: `module:name` or `path/to/file.py:name`.
        params: arguments by name, for both functions.

    Attributes:
        taken: the names of the arguments that it gets.
    """

    def __init__(self, field: str, path: str, params: Mapping[str, Any]) -> None:
        self._name = f"objective.{field}={path!r}"
        self._function = load_function(path, field=f"objective.{field}")
        try:
            signature = inspect.signature(self._function)
        except (TypeError, ValueError):  # a function in C without a signature
            self._params = dict(params)
        else:
            self._params = _accepted(signature, params)
            try:
                signature.bind("batch", **self._params)
            except TypeError as error:
                raise ConfigError(
                    f"{self._name} has the signature {signature}, but must take (batch) and names of objective.params="
                    f"{dict(params)} ({error}); correct the function or objective.params"
                ) from error
        self.taken = self._params.keys()

    def _call(self, batch: StepBatch | TokenBatch) -> Any:
        try:
            return self._function(batch, **self._params)
        except (MemoryError, torch.OutOfMemoryError):  # not a mistake of the function: the ranks are restarted
            raise
        except Exception as error:  # the user's code may raise anything
            raise ObjectiveError(f"{self._name} {failure_line(error)}; correct the function") from error

    def _refusal(self, value: object, rule: str) -> ObjectiveError:
        return ObjectiveError(f"{self._name} returned {_described(value)}, but {rule}; correct the function")


class UserLoss(_UserFunction):
    """The user's loss of each token.

    Raises:
        ConfigError: the function cannot be loaded, or called with these arguments.
    """

    def __call__(self, batch: TokenBatch) -> TokenLoss:
        """Return the losses of a micro-batch, [N].

        Raises:
            ObjectiveError: the function raised, or returned something else.
        """
        value = self._call(batch)
        is_pair = isinstance(value, tuple) and len(value) == 2
        loss, limited = value if is_pair else (value, torch.zeros_like(batch.is_response))
        like = batch.policy_logprobs
        shape = f"[N] = {_shape(like)} on {like.device}"
        if not _is_like(loss, like) or not loss.is_floating_point():
            raise self._refusal(loss, f"must return the loss of each token, float {shape}")
        if not _is_like(limited, like) or limited.dtype != torch.bool:
            raise self._refusal(limited, f"`limited` of a TokenLoss must be bool {shape}")
        if torch.is_grad_enabled() and like.requires_grad and not loss.requires_grad:
            raise self._refusal(loss, "must return a loss with gradient, computed from batch.policy_logprobs")
        return TokenLoss(loss, limited)


class UserAdvantage(_UserFunction):
    """The user's advantage of each rollout.

    Raises:
        ConfigError: the function cannot be loaded, or called with these arguments.
    """

    @torch.no_grad()
    def __call__(self, batch: StepBatch) -> Tensor:
        """Return the advantages of the global batch, float64 [Q, G], 0 where a group has no rollout.

        Raises:
            ObjectiveError: the function raised, or returned something else or a number that is not finite.
        """
        own = replace(batch, rewards=batch.rewards.clone())  # metrics read the rewards after it
        value = self._call(own)
        if not _is_like(value, batch.rewards) or value.is_complex():
            where = f"[Q, G] = {_shape(batch.rewards)} on {batch.rewards.device}"
            raise self._refusal(value, f"must return the advantage of each rollout, {where}")
        advantage = torch.where(batch.valid, value.double(), 0.0)
        wrong = ~advantage.isfinite()
        if wrong.any():
            query = int(wrong.any(1).nonzero()[0])
            rewards = [f"{r:g}" for r in batch.rewards[query][batch.valid[query]].tolist()]
            found = float(advantage[query][wrong[query]][0])
            rule = f"advantages must be finite (rewards of this query: {', '.join(rewards)})"
            raise self._refusal(f"{found} for query {query}", rule)
        return advantage


def load_user_functions(config: UserObjectiveConfig) -> tuple[UserLoss, UserAdvantage | None]:
    """Load the functions; the advantage is None if the configuration names none.

    Raises:
        ConfigError: one cannot be loaded, or called with `params`, or takes none of a name in `params`.
    """
    loss = UserLoss("loss", config.loss, config.params)
    advantage = None if config.advantage is None else UserAdvantage("advantage", config.advantage, config.params)
    taken = loss.taken | (advantage.taken if advantage else set())
    if unknown := sorted(config.params.keys() - taken):
        known = "neither function takes" if advantage else "the loss does not take"
        raise ConfigError(
            f"objective.params={config.params}: {known} {', '.join(unknown)}; remove it or correct its spelling"
        )
    return loss, advantage


def _accepted(signature: inspect.Signature, params: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that the function takes by name."""
    parameters = list(signature.parameters.values())
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return dict(params)
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    names = {parameter.name for parameter in parameters if parameter.kind in by_name}
    return {name: value for name, value in params.items() if name in names}


def _is_like(value: object, other: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == other.shape and value.device == other.device


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))


def _described(value: object) -> str:
    if not isinstance(value, Tensor):
        return value if isinstance(value, str) else f"{value!r:.80}"
    gradient = "with" if value.requires_grad else "without"
    dtype = str(value.dtype).removeprefix("torch.")
    return f"a tensor {_shape(value)} of {dtype} on {value.device} {gradient} gradient"
