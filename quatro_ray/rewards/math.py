"""Mathematical answers, compared by math-verify."""

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
# it warns, once a process, that its limits are off, which is our choice
logging.getLogger("math_verify").setLevel(logging.ERROR)


class MathReward:
    """math-verify's own time limits are off: they use SIGALRM, which some inputs never see. The process has the limit.

    Its leniency is narrowed where it pays for a guess: one that gives several values in one box (`x=8=7`; more `=` than
    the answer asked for has), and sums in place of a number. `10\\,000` is read as ten thousand.
    """

    def __init__(self, config: MathRewardConfig) -> None:
        self._config = config
        import_module("math_verify")  # now: it takes a second, which is not the first response's to pay

    def check(self, query: Query) -> str | None:
        """A gold answer must be equal to itself, or nothing ever will be. Called at loading, in the main thread, where
        math-verify's own limits are good enough for the user's own data."""
        gold = _parse(query.answer, _CHECK_DEADLINE_S)
        readable = bool(gold) and _equal(gold, gold, _CHECK_DEADLINE_S)
        return None if readable else "math-verify cannot read the answer"

    def __call__(self, query: Query, response: Response) -> float:
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
    """None unless both are integers, or the gold is one and the answer a sum or the like that is not worked out."""
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

    return parse(f"\\boxed{{{_plain(text)}}}", parsing_timeout=deadline_s)


def _equal(gold: Any, answer: list[Any], deadline_s: int | None = None) -> bool:
    from math_verify import verify

    return bool(answer) and verify(list(gold), answer, timeout_seconds=deadline_s)
