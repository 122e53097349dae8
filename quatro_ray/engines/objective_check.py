"""Calls the user's own loss and advantage on a small batch before anything starts, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys

from quatro_ray.config import ObjectiveConfig, UserObjectiveConfig
from quatro_ray.errors import ConfigError
from quatro_ray.isolation.worker_pool import worker_environment

_PROGRAM = "quatro_ray.engines.objective_trial"
_DEADLINE_S = 300.0


def check_objective(config: ObjectiveConfig) -> None:
    """Import and call the user's functions; do nothing for other objectives.

    The process of its own may crash or exit, and keeps torch out of the caller's. What the functions print is dropped.

    Raises:
        ConfigError: they cannot be loaded, fail, or return what no step can be computed from.
    """
    if not isinstance(config, UserObjectiveConfig):
        return
    named = f"objective.loss={config.loss!r}" + (f", advantage={config.advantage!r}" if config.advantage else "")
    try:
        done = subprocess.run(
            [sys.executable, "-m", _PROGRAM],
            input=config.model_dump_json().encode(),
            capture_output=True,
            timeout=_DEADLINE_S,
            env=worker_environment() | {"CUDA_VISIBLE_DEVICES": ""},
        )
    except subprocess.TimeoutExpired as error:
        raise ConfigError(
            f"{named}: importing them and calling them on a small batch takes more than {_DEADLINE_S:g} s; make them "
            "faster"
        ) from error
    if not done.stdout:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        last = f": {lines[-1]:.300}" if lines else ""
        raise ConfigError(
            f"{named}: importing them or calling them ends the process with status {done.returncode}{last}; correct "
            "the functions"
        )
    if problem := json.loads(done.stdout)["problem"]:
        raise ConfigError(problem)
