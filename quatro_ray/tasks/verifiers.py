"""The built-in verifiers: one function each. docs/rewards.md shows how to add one."""

from __future__ import annotations

import re

from quatro_ray.types import Query, Score

_INTEGER = re.compile(r"[+-]?[0-9]{1,4000}")


def integer(query: Query, text: str) -> Score:
    """1 where the whole answer, trimmed, is the integer that is asked for; else 0."""
    answer = text.strip()
    correct = _INTEGER.fullmatch(answer) is not None and int(answer) == int(query.answer)
    return Score(float(correct))


def exact(query: Query, text: str) -> Score:
    """1 where answer and response are equal after trimming white space; else 0."""
    return Score(float(text.strip() == query.answer.strip()))
