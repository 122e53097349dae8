"""Loads the user's functions that the configuration names, and tells where one of them failed."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Any

from quatro_ray.errors import ConfigError

_MAX_TRACEBACK_CHARS = 3000
_MAX_LINE_CHARS = 500
_OWN_CODE = str(Path(__file__).resolve().parents[1])


class UserFunctionError(Exception):
    """A user's function raised; the text has the traceback, and in its last line the file and line."""


def load_function(name: str, *, field: str = "function") -> Callable[..., Any]:
    """Return the user's function.

    Modules are found in the current directory too. What the function's file imports within functions is imported here
    already, so that loading torch, for example, does not count against the first call.

    Args:
        name: `module:name` or `path/to/file.py:name`.
        field: the field of the configuration that has `name`, for error messages.

    Raises:
        ConfigError: there is no such module or function, or importing the module fails.
    """
    module_name, _, attribute = name.rpartition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # at the end, so that a user's file cannot hide a library
    try:
        module = _load_file(module_name) if module_name.endswith(".py") else importlib.import_module(module_name)
        _import_ahead(module)
    except Exception as error:  # importing runs the user's code, which may raise anything
        where = f" ({place})" if (place := _place(error)) else ""
        raise ConfigError(
            f"{field}={name!r}: importing it failed: {type(error).__name__}: {error}{where}; correct it"
        ) from error
    function: Callable[..., Any] | None = getattr(module, attribute, None)
    if not callable(function):
        raise ConfigError(f"{field}={name!r}: {module_name} has no function {attribute!r}; correct the name")
    return function


def failure_text(name: str, error: BaseException) -> str:
    """Return the traceback of a user's function from its first line on, and what was raised where in the last line."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(_OWN_CODE)]
    shown = "".join(traceback.format_list(frames))[-_MAX_TRACEBACK_CHARS:].rstrip()
    place = _place(error)
    last = f"{name} raised {type(error).__name__}: {error}" + (f" ({place})" if place else "")
    return f"{shown}\n{last}" if shown else last


def failure_line(error: BaseException) -> str:
    """Return on one line what a user's function raised, and where."""
    message = " ".join(str(error).split())[:_MAX_LINE_CHARS]
    place = _place(error)
    return f"raised {type(error).__name__}: {message}" + (f" ({place})" if place else "")


def _place(error: BaseException) -> str:
    """Return file, line and function of the innermost frame outside of this package and of the import system."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((_OWN_CODE, "<frozen")) and "importlib" not in frame.filename
    ]
    return f"{frames[-1].filename}:{frames[-1].lineno}, in {frames[-1].name}" if frames else ""


def _import_ahead(module: ModuleType) -> None:
    """Import what the file imports within functions; a module that is not installed is left to the call."""
    try:
        tree = ast.parse(inspect.getsource(module))
    except (OSError, TypeError):  # no source, as of a compiled module
        return
    optional = {id(node) for outer in ast.walk(tree) if isinstance(outer, ast.Try) for node in ast.walk(outer)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [node.module]
        else:
            continue
        for name in names:
            try:
                importlib.import_module(name)
            except ModuleNotFoundError:
                continue
            except ImportError:
                if id(node) not in optional:
                    raise


def _load_file(path: str) -> ModuleType:
    # a name of its own, and in sys.modules: dataclasses and pickle look a module up by its name
    spec = importlib.util.spec_from_file_location(f"user_file_{sha256(path.encode()).hexdigest()[:16]}", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module
    spec.loader.exec_module(module)
    return module
