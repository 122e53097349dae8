"""Rewards that look at the text alone (integer, exact, regex, format, length), or at what an episode returned."""

from __future__ import annotations

import re

from quatro_ray.config import (
    EnvironmentRewardConfig,
    ExactRewardConfig,
    FormatRewardConfig,
    IntegerRewardConfig,
    LengthRewardConfig,
    RegexRewardConfig,
)
from quatro_ray.rewards.extract import extract
from quatro_ray.types import Query, Response

INTEGER = re.compile(r"[+-]?[0-9]{1,4000}")
"""Python refuses to read more digits than 4300."""


class IntegerReward:
    def __init__(self, config: IntegerRewardConfig) -> None:
        self._config = config

    def check(self, query: Query) -> str | None:
        return None if INTEGER.fullmatch(query.answer.strip()) else "needs an integer answer"

    def __call__(self, query: Query, response: Response) -> float:
        answer = extract(response.text, self._config.extract)
        if answer is None or not INTEGER.fullmatch(answer):
            return 0.0
        return float(int(answer) == int(query.answer))


class ExactReward:
    def __init__(self, config: ExactRewardConfig) -> None:
        self._config = config

    def __call__(self, query: Query, response: Response) -> float:
        answer = extract(response.text, self._config.extract)
        if answer is None:
            return 0.0
        expected = query.answer.strip()
        if self._config.ignore_case:
            answer, expected = answer.casefold(), expected.casefold()
        return float(answer == expected)


class RegexReward:
    def __init__(self, config: RegexRewardConfig) -> None:
        pattern = re.compile(config.pattern, re.DOTALL)
        self._match = pattern.fullmatch if config.match == "full" else pattern.search

    def __call__(self, query: Query, response: Response) -> float:
        return float(self._match(response.text) is not None)


class FormatReward:
    def __init__(self, config: FormatRewardConfig) -> None:
        self._tags = config.tags

    def __call__(self, query: Query, response: Response) -> float:
        rest = response.text
        for tag in self._tags:
            opening, closing = f"<{tag}>", f"</{tag}>"
            if response.text.count(opening) != 1 or response.text.count(closing) != 1:
                return 0.0
            before, found, rest = rest.partition(opening)
            _, closed, rest = rest.partition(closing)
            if before.strip() or not found or not closed:
                return 0.0
        return float(not rest.strip())


class LengthReward:
    def __init__(self, config: LengthRewardConfig) -> None:
        self._config = config

    def __call__(self, query: Query, response: Response) -> float:
        over = response.num_tokens - (self._config.max_tokens - self._config.buffer_tokens)
        return -min(max(over / self._config.buffer_tokens, 0.0), 1.0)


class EnvironmentReward:
    """Raises KeyError where the episode returned no such value: that is the environment's fault, not the response's."""

    def __init__(self, config: EnvironmentRewardConfig) -> None:
        self._key = config.key

    def __call__(self, query: Query, response: Response) -> float:
        if self._key not in response.environment:
            raise KeyError(f"the episode returned {sorted(response.environment) or 'nothing'}, not {self._key!r}")
        return response.environment[self._key]
