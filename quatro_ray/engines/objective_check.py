"""Calls the user's own loss and advantage on a small batch before anything starts, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from quatro_ray.config import ObjectiveConfig, UserObjectiveConfig
from quatro_ray.errors import ConfigError
from quatro_ray.isolation import keeper

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
            keeper.command(_PROGRAM),
            input=config.model_dump_json().encode(),
            capture_output=True,
            timeout=_DEADLINE_S,
            env=_environment(),
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


def _environment() -> dict[str, str]:
    """Return what the learner's ranks have, where the functions run later, without Ray's variables and without GPUs."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return own | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "CUDA_VISIBLE_DEVICES": ""}
