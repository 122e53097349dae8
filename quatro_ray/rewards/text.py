"""Rewards from the text alone (integer, exact, regex, format, length), and the one from what an episode returned."""

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
from quatro_ray.rewards.extract import answer_of, extract, marked, unreachable
from quatro_ray.rewards.numerals import integer_of
from quatro_ray.types import Query, Response


class IntegerReward:
    """1 if the response's answer is an integer equal to the query's, else 0.

    Thousands separators, a currency sign and a full stop do not count, on both sides: `$2,125` is 2125.
    """

    def __init__(self, config: IntegerRewardConfig) -> None:
        self._config = config

    def check(self, query: Query) -> str | None:
        """Return why the query's answer cannot be used, or None if it can."""
        return None if _gold_integer(query.answer) is not None else "needs an integer answer"

    def __call__(self, query: Query, response: Response) -> float:
        """Return 1 or 0; the numbers are compared, so that `+07` equals `7`."""
        answer = answer_of(response, self._config)
        found = None if answer is None else integer_of(answer)
        return float(found is not None and found == _gold_integer(query.answer))


def _gold_integer(answer: str) -> int | None:
    """Return the integer; in GSM8K's answers it follows ####."""
    return integer_of(extract(answer, "hashes") or answer)


class ExactReward:
    """1 if the response's answer is the query's, white space at the ends aside, else 0."""

    def __init__(self, config: ExactRewardConfig) -> None:
        self._config = config

    def check(self, query: Query) -> str | None:
        """Return why no response could give the query's answer, or None if one can."""
        return unreachable(self._expected(query), self._config.extract)

    def _expected(self, query: Query) -> str:
        """Return the query's answer as a response would give it: `1,234` is the last number `1234`."""
        answer = query.answer.strip()
        if self._config.extract == "last_number" and answer:
            return extract(marked(answer, "last_number"), "last_number") or answer
        return answer

    def __call__(self, query: Query, response: Response) -> float:
        """Return 1 or 0; if `ignore_case` is set, upper and lower case are the same."""
        answer = answer_of(response, self._config)
        if answer is None:
            return 0.0
        expected = self._expected(query)
        if self._config.ignore_case:
            answer, expected = answer.casefold(), expected.casefold()
        return float(answer == expected)


class RegexReward:
    """1 if the pattern matches the response, in full or anywhere as configured, else 0."""

    def __init__(self, config: RegexRewardConfig) -> None:
        pattern = re.compile(config.pattern, re.DOTALL)
        self._match = pattern.fullmatch if config.match == "full" else pattern.search

    def __call__(self, query: Query, response: Response) -> float:
        """Return 1 or 0; a `.` in the pattern matches a newline too."""
        return float(self._match(response.text) is not None)


class FormatReward:
    """1 if the response consists of exactly one element for each tag, in their order, else 0.

    A tag that the chat template opened at the end of the prompt belongs to the response.
    """

    def __init__(self, config: FormatRewardConfig) -> None:
        self._tags = config.tags

    def __call__(self, query: Query, response: Response) -> float:
        """Return 1 or 0; text other than white space outside the elements gives 0."""
        whole = rest = self._begun(response.prompt_tail) + response.text
        for tag in self._tags:
            opening, closing = f"<{tag}>", f"</{tag}>"
            if whole.count(opening) != 1 or whole.count(closing) != 1:
                return 0.0
            before, found, rest = rest.partition(opening)
            _, closed, rest = rest.partition(closing)
            if before.strip() or not found or not closed:
                return 0.0
        return float(not rest.strip())

    def _begun(self, prompt_tail: str) -> str:
        """Return the prompt's tail from the first tag that it opens."""
        starts = [start for tag in self._tags if (start := prompt_tail.find(f"<{tag}>")) >= 0]
        return prompt_tail[min(starts) :] if starts else ""


class LengthReward:
    """The soft overlong penalty: 0 up to max_tokens − buffer_tokens, then linear to −1 at max_tokens and beyond.

    Source: DAPO, arXiv 2503.14476, section 3.4, equation 13.
    """

    def __init__(self, config: LengthRewardConfig) -> None:
        self._config = config

    def __call__(self, query: Query, response: Response) -> float:
        """Return the penalty, from −1 to 0, for the number of tokens that the policy sampled."""
        over = response.num_tokens - (self._config.max_tokens - self._config.buffer_tokens)
        return -min(max(over / self._config.buffer_tokens, 0.0), 1.0)


class EnvironmentReward:
    """A value that the episode returned, by its name."""

    def __init__(self, config: EnvironmentRewardConfig) -> None:
        self._key = config.key

    def __call__(self, query: Query, response: Response) -> float:
        """Return the value.

        Raises:
            KeyError: the episode returned no such value, which is the environment's fault and not the response's.
        """
        if self._key not in response.environment:
            raise KeyError(f"the episode returned {sorted(response.environment) or 'nothing'}, not {self._key!r}")
        return response.environment[self._key]
