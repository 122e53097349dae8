"""Compares mathematical answers with math-verify."""

from __future__ import annotations

import logging
from functools import lru_cache
from importlib import import_module
from typing import Any

from quatro_ray.config import MathRewardConfig
from quatro_ray.rewards.extract import extract
from quatro_ray.rewards.text import INTEGER
from quatro_ray.types import Query, Response

_CHECK_DEADLINE_S = 5
# math-verify warns once in each process that its time limits are off, which is intended
logging.getLogger("math_verify").setLevel(logging.ERROR)


class MathReward:
    r"""A reward of 1 if math-verify finds the response's answer equal to the query's, else 0.

    The time limits of math-verify are off: they use SIGALRM, which some inputs never let through. The deadline of the
    worker process replaces them.

    Two kinds of guesses that math-verify accepts are wrong here: several values in one box (`x=8=7`, which has more `=`
    than the query's answer), and a sum in place of an integer. `10\,000` is read as ten thousand.
    """

    def __init__(self, config: MathRewardConfig) -> None:
        self._config = config
        import_module("math_verify")  # here: importing takes a second, which must not count against the first response

    def check(self, query: Query) -> str | None:
        """Return why responses to the query cannot be scored, or None if they can.

        An answer that is not equal to itself would never equal any response. This runs in the main thread when the data
        is loaded; there math-verify's own time limits work well enough for the user's own data.
        """
        gold = _parse(query.answer, _CHECK_DEADLINE_S)
        readable = bool(gold) and _equal(gold, gold, _CHECK_DEADLINE_S)
        return None if readable else "math-verify cannot read the answer"

    def __call__(self, query: Query, response: Response) -> float:
        """Return 1 or 0.

        Raises:
            ValueError: math-verify cannot read the query's answer.
        """
        answer = extract(response.text, self._config.extract)
        if not answer or len(answer) > self._config.max_answer_chars:
            return 0.0
        exact = _compare_integers(query.answer, answer)
        if exact is not None:
            return float(exact)
        if answer.count("=") > max(1, query.answer.count("=")):
            return 0.0
        gold = _gold(query.answer)
        if not gold:
            raise ValueError(f"math-verify cannot read the answer {query.answer[:80]!r} of {query.query_id}")
        return float(_equal(gold, _parse(answer)))


def _compare_integers(gold: str, answer: str) -> bool | None:
    """Return whether two integers are equal; None if math-verify has to compare the answers.

    If only the gold answer is an integer, a sum or difference of integers that is not worked out is wrong.
    """
    gold, answer = _plain(gold), _plain(answer)
    if not INTEGER.fullmatch(gold):
        return None
    if INTEGER.fullmatch(answer):
        return int(gold) == int(answer)
    return False if answer.strip("+-").replace("+", "").replace("-", "").isdigit() else None


def _plain(text: str) -> str:
    return text.strip().removesuffix(".").strip("$").replace("\\,", "").replace("\\!", "").replace("{,}", "").strip()


@lru_cache(maxsize=4096)
def _gold(answer: str) -> tuple[Any, ...]:
    return tuple(_parse(answer))


def _parse(text: str, deadline_s: int | None = None) -> list[Any]:
    from math_verify import parse

    return list(parse(f"\\boxed{{{_plain(text)}}}", parsing_timeout=deadline_s))


def _equal(gold: Any, answer: list[Any], deadline_s: int | None = None) -> bool:
    from math_verify import verify

    return bool(answer) and verify(list(gold), answer, timeout_seconds=deadline_s)
