"""Compares mathematical answers with math-verify."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from fractions import Fraction
from functools import lru_cache
from importlib import import_module
from typing import Any

from quatro_ray.config import MathRewardConfig
from quatro_ray.rewards.extract import answer_of, marked
from quatro_ray.rewards.numerals import integer_of, number_of
from quatro_ray.types import Query, Response

_CHECK_DEADLINE_S = 5
_TOLERANCE = Fraction(2, 10**6)
"""Largest difference between two equal numbers, relative to the larger one, if the expected one is no integer."""
_E_NOTATION = re.compile(r"(?<![\w.])([0-9]+(?:\.[0-9]+)?|\.[0-9]+)[eE]([+-]?[0-9]{1,3})(?!\w)")
# math-verify warns once in each process that its time limits are off, which is intended
logging.getLogger("math_verify").setLevel(logging.ERROR)


class MathReward:
    r"""A reward of 1 if math-verify finds the response's answer equal to the query's, else 0.

    The time limits of math-verify are off: they use SIGALRM, which some inputs never let through. The deadline of the
    worker process replaces them.

    Numbers are compared here and not by math-verify, which finds 0.0000001 and 0.0000002 equal and does not read 1e-5.
    A list of answers is a set. Two kinds of guesses that math-verify accepts are wrong: several values in one box
    (`x=8=7`, which has more `=` than the query's answer), and a sum in place of an integer.
    """

    def __init__(self, config: MathRewardConfig) -> None:
        self._config = config
        import_module("math_verify")  # here: importing takes a second, which must not count against the first response

    def check(self, query: Query) -> str | None:
        """Return why responses to the query cannot be scored, or None if they can.

        Plain renderings of the answer must score 1; what does not equal itself would never equal any response. This
        runs in the main thread when the data is loaded; there math-verify's own time limits work well enough for the
        user's own data.
        """
        if _is_object(query.answer):
            return "needs an answer, not an object with several fields"
        wrong = next((text for text in _renderings(query.answer) if not self._accepts(query.answer, text)), None)
        return None if wrong is None else f"math-verify cannot read the answer (a response of {wrong[:40]!r} is wrong)"

    def _accepts(self, gold: str, rendering: str) -> bool:
        response = Response(marked(rendering, self._config.extract), 1, truncated=False)
        answer = answer_of(response, self._config)
        try:
            return bool(answer) and _are_equal(gold, answer or "", _CHECK_DEADLINE_S)
        except ValueError:  # math-verify cannot read the expected answer
            return False

    def __call__(self, query: Query, response: Response) -> float:
        """Return 1 or 0.

        Raises:
            ValueError: math-verify cannot read the query's answer.
        """
        answer = answer_of(response, self._config)
        if not answer or len(answer) > self._config.max_answer_chars:
            return 0.0
        if answer.count("=") > max(1, query.answer.count("=")):
            return 0.0
        return float(_are_equal(query.answer, answer))


def _are_equal(gold: str, answer: str, deadline_s: int | None = None) -> bool:
    """Return whether the answer is the expected one; raises ValueError if math-verify cannot read the expected one."""
    gold = _as_set(gold)
    exact = _compare_numbers(gold, answer)
    if exact is not None:
        return exact
    read = _gold(gold) if deadline_s is None else _parse(gold, deadline_s)
    if not read:
        raise ValueError(f"math-verify cannot read the answer {gold[:80]!r}")
    return _equal(read, _parse(answer, deadline_s), deadline_s)


def _renderings(gold: str) -> Iterator[str]:
    """Yield plain ways to write the answer."""
    items = _items(gold)
    if items is None:
        yield gold.strip()
    else:
        yield from (", ".join(items), ",".join(reversed(items)), rf"\{{{','.join(items)}\}}")


def _items(gold: str) -> list[str] | None:
    """Return the answers in a list of texts, such as a row of data has, or None; `[1,2]` is an interval."""
    try:
        items = json.loads(gold) if gold.lstrip().startswith("[") else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(items, list) or not items or not all(isinstance(item, str) for item in items):
        return None
    return [item.strip() for item in items]


def _is_object(gold: str) -> bool:
    try:
        return gold.lstrip().startswith(("{", "[{")) and isinstance(json.loads(gold), dict | list)
    except (ValueError, RecursionError):
        return False


def _as_set(gold: str) -> str:
    items = _items(gold)
    if items is None:
        return gold
    return items[0] if len(items) == 1 else rf"\{{{','.join(items)}\}}"


def _compare_numbers(gold: str, answer: str) -> bool | None:
    """Return whether two numbers are equal; None if math-verify has to compare the answers.

    If only the gold answer is an integer, a sum or difference of integers that is not worked out is wrong.
    """
    gold, answer = _plain(gold), _plain(answer)
    expected, found = number_of(gold), number_of(answer)
    whole = integer_of(gold) is not None
    if expected is None or found is None:
        return False if whole and answer.strip("+-").replace("+", "").replace("-", "").isdigit() else None
    return expected == found or (not whole and abs(expected - found) <= _TOLERANCE * max(abs(expected), abs(found)))


def _plain(text: str) -> str:
    return text.strip().removesuffix(".").strip("$").replace("\\,", "").replace("\\!", "").replace("{,}", "").strip()


@lru_cache(maxsize=4096)
def _gold(answer: str) -> tuple[Any, ...]:
    return tuple(_parse(answer))


def _parse(text: str, deadline_s: int | None = None) -> list[Any]:
    from math_verify import parse

    text = _E_NOTATION.sub(r"\1 \\times 10^{\2}", _plain(text))
    return list(parse(f"\\boxed{{{text}}}", parsing_timeout=deadline_s))


def _equal(gold: Any, answer: list[Any], deadline_s: int | None = None) -> bool:
    from math_verify import verify

    return bool(answer) and verify(list(gold), answer, timeout_seconds=deadline_s)
