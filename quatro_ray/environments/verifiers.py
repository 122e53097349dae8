"""Deprecated alias of quatro_ray.environments.verifiers_library, for configurations that still name it."""

from __future__ import annotations

import warnings

from quatro_ray.environments.verifiers_library import episode

__all__ = ["episode"]

warnings.warn(
    "quatro_ray.environments.verifiers is now quatro_ray.environments.verifiers_library; change `function` in the "
    "configuration",
    DeprecationWarning,
    stacklevel=2,
)
