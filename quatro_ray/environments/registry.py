"""From the configuration to the functions of environments, and to what each query plays in."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from quatro_ray.config import Config, EnvironmentConfig
from quatro_ray.errors import ConfigError
from quatro_ray.isolation.bubblewrap import in_the_sandbox
from quatro_ray.isolation.user_function import load_function
from quatro_ray.isolation.worker_pool import ProcessPool, in_the_open

_PROGRAM = "quatro_ray.environments.worker"


def load_environment(path: str, params: Mapping[str, Any]) -> Callable[..., Any]:
    """Raises ConfigError where the function is not there or does not take these arguments."""
    function = load_function(path)
    try:
        inspect.signature(function).bind("query", "policy", **params)
    except TypeError as error:
        raise ConfigError(
            f"function={path!r}: cannot be called with (query, policy{''.join(f', {p}=…' for p in params)}): {error}; "
            "correct the function or `params`"
        ) from error
    return function


def check_environments(environments: Mapping[str, EnvironmentConfig]) -> None:
    """Before anything starts. Raises ConfigError with the name of the environment."""
    for name, environment in environments.items():
        try:
            load_environment(environment.function, environment.params)
        except ConfigError as error:
            raise ConfigError(f"environments.{name}: {error}") from error


def episode_workers(config: EnvironmentConfig) -> ProcessPool:
    """Not started yet."""
    if config.sandbox:
        launch = in_the_sandbox(_PROGRAM, config.memory_mib, read_only=_file_of(config.function))
    else:
        launch = in_the_open(_PROGRAM)
    return ProcessPool(
        launch,
        {"function": config.function, "params": config.params},
        num_workers=config.num_workers,
        memory_mib=config.memory_mib,
        start_deadline_s=config.start_deadline_s,
        recycle_after=config.recycle_after,
    )


def _file_of(function: str) -> list[Path]:
    """Of a function in a file: that file, and not its neighbours, for what the policy wrote could read them too. An
    installed module can be read anyway."""
    module, _, _ = function.rpartition(":")
    return [Path(module)] if module.endswith(".py") else []


def environment_of(config: Config) -> dict[str, str]:
    """By source: the name of its environment, for those that have one."""
    return {name: same[0].environment for name, same in config.sources.items() if same[0].environment is not None}
