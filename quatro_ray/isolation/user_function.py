"""Loads the user's functions that the configuration names."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from hashlib import sha256
from types import ModuleType
from typing import Any

from quatro_ray.errors import ConfigError


def load_function(name: str) -> Callable[..., Any]:
    """Return the user's function.

    Args:
        name: `module:name` or `path/to/file.py:name`.

    Raises:
        ConfigError: there is no such module or function, or importing the module fails.
    """
    module_name, _, attribute = name.rpartition(":")
    try:
        module = _load_file(module_name) if module_name.endswith(".py") else importlib.import_module(module_name)
    except Exception as error:  # importing runs the user's code, which may raise anything
        raise ConfigError(f"function={name!r}: importing it failed: {type(error).__name__}: {error}") from error
    function: Callable[..., Any] | None = getattr(module, attribute, None)
    if not callable(function):
        raise ConfigError(f"function={name!r}: {module_name} has no function {attribute!r}; correct the name")
    return function


def _load_file(path: str) -> ModuleType:
    # a name of its own, and in sys.modules: dataclasses and pickle look a module up by its name
    spec = importlib.util.spec_from_file_location(f"user_file_{sha256(path.encode()).hexdigest()[:16]}", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module
    spec.loader.exec_module(module)
    return module
