"""Finds the trackers and callbacks that the configuration names."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from quatro_ray.config import TelemetryConfig
from quatro_ray.errors import ConfigError, Problems
from quatro_ray.isolation.user_function import load_function
from quatro_ray.telemetry.tracker import Tracker

_CLASSES: Final = {
    "tensorboard": "TensorBoard",
    "wandb": "WeightsAndBiases",
    "mlflow": "MLflow",
    "trackio": "Trackio",
    "swanlab": "SwanLab",
}
"""The class of each tracker, in the module of this package that has the tracker's name."""
HOOKS: Final = tuple(name for name in vars(Tracker) if name.startswith("on_"))
"""The names of the methods of a tracker."""
_FIELD = "telemetry.callbacks"


def make_tracker(name: str) -> Any:
    """Return a new tracker, or the user's callback if the name is an import path.

    Raises:
        ConfigError: its client is not installed, or the callback cannot be loaded.
    """
    if name not in _CLASSES:
        return _load_callback(name)()
    return _load_class(name)()


def check_trackers(config: TelemetryConfig) -> None:
    """Import every tracker's client and every callback.

    Raises:
        SeveralErrors: several of them cannot be used.
        ConfigError: one of them cannot be used.
    """
    problems = Problems()
    for name in config.trackers:
        with problems.collect():
            _load_class(name)
    for path in config.callbacks:
        with problems.collect():
            _load_callback(path)
    problems.refuse()


def _load_class(name: str) -> Any:
    try:
        return getattr(importlib.import_module(f"quatro_ray.trackers.{name}"), _CLASSES[name])
    except ImportError as error:
        raise ConfigError(
            f"telemetry.trackers: the client of {name} cannot be imported ({error}); install it with `pip install "
            f"{name}` (docs/trackers.md), or remove it from the list"
        ) from error


def _load_callback(path: str) -> Callable[[], Any]:
    """Return what makes the user's callback: their class, or a class around their function of a step."""
    found = load_function(path, field=_FIELD)
    if not inspect.isclass(found):
        _check_arguments(path, found, ["step", "metrics"])
        return lambda: _EachStep(found)
    _check_arguments(path, found, [])
    hooks = [name for name in dir(found) if name.startswith("on_")]
    if not hooks or set(hooks) - set(HOOKS):
        raise ConfigError(
            f"{_FIELD}={path!r}: has the methods {hooks or 'none'}, but a callback has one or more of "
            f"{', '.join(HOOKS)}; correct their names"
        )
    for name in hooks:
        if inspect.isfunction(method := inspect.getattr_static(found, name)):
            _check_arguments(f"{path}.{name}", method, list(inspect.signature(getattr(Tracker, name)).parameters))
    return found


def _check_arguments(name: str, function: Callable[..., Any], expected: Sequence[str]) -> None:
    try:
        inspect.signature(function).bind(*expected)
    except TypeError as error:
        raise ConfigError(
            f"{_FIELD}={name!r}: cannot be called with ({', '.join(expected)}): {error}; correct its arguments"
        ) from error


class _EachStep(Tracker):
    """Calls the user's function with each step and its metrics."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def on_step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Call the function."""
        self._function(step, metrics)
