"""Loads a user's function, named in the configuration."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from hashlib import sha256
from typing import Any

from quatro_ray.errors import ConfigError


def load_function(name: str) -> Callable[..., Any]:
    """`module:name` or `path/to/file.py:name`.

    Raises:
        ConfigError: no such module or function, or importing it fails; with the reason.
    """
    module_name, _, attribute = name.rpartition(":")
    try:
        module = _load_file(module_name) if module_name.endswith(".py") else importlib.import_module(module_name)
    except Exception as error:  # the user's code runs here and may raise anything; the message names it
        raise ConfigError(f"function={name!r}: importing it failed: {type(error).__name__}: {error}") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise ConfigError(f"function={name!r}: {module_name} has no function {attribute!r}; correct the name")
    return function


def _load_file(path: str) -> Any:
    # dataclasses and pickle look a module up by its name
    spec = importlib.util.spec_from_file_location(f"user_file_{sha256(path.encode()).hexdigest()[:16]}", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module
    spec.loader.exec_module(module)
    return module
