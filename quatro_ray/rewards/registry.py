"""Makes rewards from the configuration. A new kind needs its class here and its section in config/rewards.py."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from quatro_ray.config import (
    CodeRewardConfig,
    EnvironmentRewardConfig,
    EvalSourceConfig,
    ExactRewardConfig,
    FormatRewardConfig,
    HttpRewardConfig,
    IntegerRewardConfig,
    LengthRewardConfig,
    MathRewardConfig,
    ModelRewardConfig,
    PythonRewardConfig,
    ReasoningGymRewardConfig,
    ReasoningGymSourceConfig,
    RegexRewardConfig,
    RewardConfig,
    SandboxFusionRewardConfig,
)
from quatro_ray.rewards.base import RemoteReward, Reward
from quatro_ray.rewards.reasoning_gym import EXECUTING_TASKS
from quatro_ray.types import Query

if TYPE_CHECKING:
    from quatro_ray.rewards.reward_model_client import RewardModelHandle

REMOTE = (HttpRewardConfig, ModelRewardConfig, SandboxFusionRewardConfig)
"""Kinds whose rewards servers compute; all other kinds run in worker processes."""


def make_reward(config: RewardConfig) -> Reward:
    """Return the reward of a kind that runs in a worker process.

    Raises:
        ConfigError: the user's function cannot be loaded.
    """
    from quatro_ray.rewards import code, math, python_function, reasoning_gym, text

    classes: Mapping[type, Callable[[Any], Reward]] = {
        IntegerRewardConfig: text.IntegerReward,
        ExactRewardConfig: text.ExactReward,
        RegexRewardConfig: text.RegexReward,
        FormatRewardConfig: text.FormatReward,
        LengthRewardConfig: text.LengthReward,
        MathRewardConfig: math.MathReward,
        ReasoningGymRewardConfig: reasoning_gym.ReasoningGymReward,
        CodeRewardConfig: code.CodeReward,
        PythonRewardConfig: python_function.PythonReward,
        EnvironmentRewardConfig: text.EnvironmentReward,
    }
    return classes[type(config)](config)


def executing_rewards(rewards: Mapping[str, RewardConfig], sources: Iterable[EvalSourceConfig]) -> frozenset[str]:
    """Return the names of rewards that execute responses in their own process: some of reasoning-gym's do."""
    tasks = {source.task for source in sources if isinstance(source, ReasoningGymSourceConfig)}
    if not tasks & EXECUTING_TASKS:
        return frozenset()
    return frozenset(name for name, config in rewards.items() if isinstance(config, ReasoningGymRewardConfig))


def applies(config: RewardConfig, query: Query) -> bool:
    """Return whether the reward scores responses to this query."""
    return config.only is None or query.source in config.only


def make_remote(
    rewards: Mapping[str, RewardConfig], models: Mapping[str, Sequence[RewardModelHandle]]
) -> dict[str, RemoteReward]:
    """Return the rewards that servers compute, by name.

    Args:
        rewards: all configured rewards, by name; those that run in worker processes are left out.
        models: handles of reward-model actors, by the name of their reward.

    Raises:
        ConfigError: the environment variable of a token is missing.
    """
    made: dict[str, RemoteReward] = {}
    for name, config in rewards.items():
        if isinstance(config, HttpRewardConfig):
            from quatro_ray.rewards.http import HttpReward

            made[name] = HttpReward(config)
        elif isinstance(config, SandboxFusionRewardConfig):
            from quatro_ray.rewards.sandbox_fusion import SandboxFusionReward

            made[name] = SandboxFusionReward(config)
        elif isinstance(config, ModelRewardConfig):
            from quatro_ray.rewards.reward_model_client import ModelReward

            made[name] = ModelReward(config, models[name])
    return made
