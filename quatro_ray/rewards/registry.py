"""From the configuration to rewards. A new kind needs its class here and its section in config/rewards.py."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from quatro_ray.config import (
    CodeRewardConfig,
    EnvironmentRewardConfig,
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
    SourceConfig,
)
from quatro_ray.rewards.base import RemoteReward, Reward
from quatro_ray.rewards.reasoning_gym import EXECUTING_TASKS
from quatro_ray.types import Query

REMOTE = (HttpRewardConfig, ModelRewardConfig, SandboxFusionRewardConfig)
"""Judged by servers; all others run in worker processes."""


def make_reward(config: RewardConfig) -> Reward:
    """One that runs in a worker process.

    Raises:
        ConfigError: a function of the user's is not there.
    """
    from quatro_ray.rewards import code, math, python_function, reasoning_gym, text

    classes: Mapping[type, Any] = {
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


def executing_parts(rewards: Mapping[str, RewardConfig], sources: Iterable[SourceConfig]) -> frozenset[str]:
    """Names of parts that execute responses in their own process: scorers of some reasoning-gym tasks."""
    tasks = {source.task for source in sources if isinstance(source, ReasoningGymSourceConfig)}
    if not tasks & EXECUTING_TASKS:
        return frozenset()
    return frozenset(name for name, part in rewards.items() if isinstance(part, ReasoningGymRewardConfig))


def applies(config: RewardConfig, query: Query) -> bool:
    return config.only is None or query.source in config.only


def make_remote(rewards: Mapping[str, RewardConfig], models: Mapping[str, list[Any]]) -> dict[str, RemoteReward]:
    """Those that servers judge, by name. `models`: handles of reward-model actors, by the name of their part.

    Raises:
        ConfigError: a token's environment variable is missing.
    """
    made: dict[str, RemoteReward] = {}
    for name, part in rewards.items():
        if isinstance(part, HttpRewardConfig):
            from quatro_ray.rewards.http import HttpReward

            made[name] = HttpReward(part)
        elif isinstance(part, SandboxFusionRewardConfig):
            from quatro_ray.rewards.sandbox_fusion import SandboxFusionReward

            made[name] = SandboxFusionReward(part)
        elif isinstance(part, ModelRewardConfig):
            from quatro_ray.rewards.reward_model_client import ModelReward

            made[name] = ModelReward(part, models[name])
    return made
