"""A user's own function as a reward, with our signature, verl's or TRL's."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from quatro_ray.chats import is_chat, messages_of
from quatro_ray.config import PythonRewardConfig
from quatro_ray.errors import ConfigError
from quatro_ray.isolation.user_function import UserFunctionError, failure_text, load_function
from quatro_ray.types import Query, Response

Arguments = Callable[[Query, Response], tuple[tuple[Any, ...], dict[str, Any]]]
"""Makes the positional and named arguments of a call."""
_VERL = ("data_source", "solution_str", "ground_truth")


class PythonReward:
    """The number that the user's function returns, or None for no verdict. The function may be `async`.

    docs/rewards.md has the three signatures that it may have.

    Raises:
        ConfigError: the function cannot be loaded, or has none of these signatures.
    """

    def __init__(self, config: PythonRewardConfig) -> None:
        self._name = config.function
        self._function = load_function(config.function)
        self._arguments, self._unwrap = _convention(self._name, self._function)

    def __call__(self, query: Query, response: Response) -> float | None:
        """Return the reward, or None if the function gave no verdict.

        Raises:
            TypeError: the function returned no number.
            UserFunctionError: the function raised; the text has file, line and traceback.
        """
        args, named = self._arguments(query, response)
        try:
            value = self._function(*args, **named)
            if inspect.isawaitable(value):
                value = asyncio.run(_awaited(value))
        except (MemoryError, RecursionError):  # limits of the response, see isolation/protocol.py
            raise
        except Exception as error:  # the user's code may raise anything
            raise UserFunctionError(failure_text(self._name, error)) from error
        return self._number(value)

    def _number(self, value: Any) -> float | None:
        try:
            reward = self._unwrap(value)
            return None if reward is None else float(reward)
        except (TypeError, ValueError, LookupError) as error:
            raise TypeError(f"{self._name} must return a number or None, not {value!r:.80}") from error


async def _awaited(value: Any) -> Any:
    return await value


def _convention(name: str, function: Callable[..., Any]) -> tuple[Arguments, Callable[[Any], Any]]:
    """Return how the function is called, and how the reward is read from what it returns."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # a function in C without a signature
        return _ours, _same
    if set(_VERL) <= parameters.keys():
        return lambda query, response: ((), _accepted(parameters, _verl(query, response))), _score_of
    if "completions" in parameters:
        return lambda query, response: ((), _accepted(parameters, _trl(query, response))), _only
    try:
        inspect.signature(function).bind(None, None)
    except TypeError as error:
        raise ConfigError(
            f"function={name!r} has the signature {inspect.signature(function)}, but must take (query, response), "
            "verl's (data_source, solution_str, ground_truth, extra_info) or TRL's (completions, **kwargs); correct it"
        ) from error
    return _ours, _same


def _ours(query: Query, response: Response) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (query, response), {}


def _verl(query: Query, response: Response) -> dict[str, Any]:
    extra = query.metadata.get("extra_info")
    return {
        "data_source": query.metadata.get("data_source", query.source),
        "solution_str": response.text,
        "ground_truth": query.answer,
        "extra_info": dict(extra) if isinstance(extra, Mapping) else dict(query.metadata),
    }


def _trl(query: Query, response: Response) -> dict[str, Any]:
    """Return lists of one item, as TRL passes a batch: columns of the row, the prompt and the completion."""
    chat = is_chat(query.prompt)
    completion = [{"role": "assistant", "content": response.text}] if chat else response.text
    columns = {name: [value] for name, value in query.metadata.items()}
    return columns | {
        "prompts": [messages_of(query.prompt) if chat else query.prompt],
        "completions": [completion],
        "answer": [query.answer],
    }


def _accepted(parameters: Mapping[str, inspect.Parameter], named: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments that the function takes."""
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return named
    return {name: value for name, value in named.items() if name in parameters}


def _same(value: Any) -> Any:
    return value


def _score_of(value: Any) -> Any:
    """Return the reward of a verl function, which may return a dictionary with `score`."""
    return value["score"] if isinstance(value, Mapping) else value


def _only(value: Any) -> Any:
    """Return the reward of the only completion in TRL's list."""
    if value is None:
        return None
    (reward,) = value
    return reward
