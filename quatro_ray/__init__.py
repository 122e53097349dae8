"""quatro_ray: asynchronous RL for language models with an exact trust region per query.

The public names load on first use, because worker processes import this package and need little of it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from quatro_ray.config import Config, load_config
    from quatro_ray.environments.base import Policy
    from quatro_ray.jobs.train import train
    from quatro_ray.types import Query, Response, Turn

__version__ = "0.1.0"
__all__ = ["Config", "Policy", "Query", "Response", "Turn", "load_config", "train"]

_HOMES = {
    "Config": "config",
    "load_config": "config",
    "Policy": "environments.base",
    "train": "jobs.train",
    "Query": "types",
    "Response": "types",
    "Turn": "types",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
