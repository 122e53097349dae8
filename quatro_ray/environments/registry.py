"""Loads the functions of environments, and makes the processes that run them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path

from quatro_ray.config import Config, EnvironmentConfig
from quatro_ray.environments.base import Environment
from quatro_ray.errors import ConfigError
from quatro_ray.isolation.bubblewrap import in_the_sandbox
from quatro_ray.isolation.user_function import load_function
from quatro_ray.isolation.worker_pool import ProcessPool, in_the_open

_PROGRAM = "quatro_ray.environments.worker"


def load_environment(path: str, params: Mapping[str, object]) -> Environment:
    """Return the function of an environment.

    Args:
        path: `module:name` or `path/to/file.py:name`.
        params: keyword arguments with which the function is to be called.

    Raises:
        ConfigError: the function cannot be loaded or does not take these arguments.
    """
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
    """Load every environment once, before anything starts.

    Raises:
        ConfigError: an environment cannot be loaded; the message has its name.
    """
    for name, environment in environments.items():
        try:
            load_environment(environment.function, environment.params)
        except ConfigError as error:
            raise ConfigError(f"environments.{name}: {error}") from error


def episode_workers(config: EnvironmentConfig) -> ProcessPool:
    """Return the pool of processes that play episodes; it is not started yet."""
    if config.sandbox:
        launch = in_the_sandbox(_PROGRAM, config.memory_mib, read_only=_file_of(config.function))
    else:
        launch = in_the_open(_PROGRAM, config.pass_env)
    return ProcessPool(
        launch,
        {"function": config.function, "params": config.params},
        num_workers=config.num_workers,
        memory_mib=config.memory_mib,
        start_deadline_s=config.start_deadline_s,
        recycle_after=config.recycle_after,
    )


def _file_of(function: str) -> list[Path]:
    """Return the file of a function that lives in a file.

    Other files of its folder are not mounted, because code that the policy wrote could read them too. An installed
    module is readable anyway.
    """
    module, _, _ = function.rpartition(":")
    return [Path(module)] if module.endswith(".py") else []


def environment_of(config: Config) -> dict[str, str]:
    """Return the name of each source's environment, for the sources that have one."""
    return {name: same[0].environment for name, same in config.sources.items() if same[0].environment is not None}
