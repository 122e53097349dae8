"""Extracts the answer from a response."""

from __future__ import annotations

import re

from quatro_ray.config import Extraction
from quatro_ray.rewards.numerals import last_numeral
from quatro_ray.types import Response

_BOX = re.compile(r"\\boxed\s*\{")
_TAIL_CHARS = 4000
"""Length of the response's end that is searched for the last number: searching more only costs time."""


def extract(text: str, extraction: Extraction) -> str | None:
    """Return the answer without white space at its ends, or None if the response does not mark one."""
    found = _FINDERS[extraction](text)
    return None if found is None else found.strip()


def answer_of(response: Response, config: object) -> str | None:
    """Return the answer of a response to a reward, or None if the response does not mark one.

    Args:
        response: its prompt_tail counts, because a chat template may open `<think>` there.
        config: the reward's section; `extract` (default: whole) and `unclosed_think` are read.
    """
    extraction: Extraction = getattr(config, "extract", "whole")
    if getattr(config, "unclosed_think", "search") == "no_answer" and is_thinking(response):
        return None
    return extract(response.text, extraction)


def is_thinking(response: Response) -> bool:
    """Return whether the response, or the end of its prompt, opens `<think>` and never closes it."""
    opened = (response.prompt_tail + response.text).rpartition("<think>")
    return bool(opened[1]) and "</think>" not in opened[2]


def marked(answer: str, extraction: Extraction) -> str:
    """Return the shortest response that gives this answer."""
    return _MARKS[extraction].replace("ANSWER", answer)


def unreachable(answer: str, extraction: Extraction) -> str | None:
    """Return why no response can give this answer, word for word, or None if one can."""
    if not answer.strip():
        return "needs an answer that is not blank"
    if extract(marked(answer, extraction), extraction) == answer.strip():
        return None
    return f"needs an answer that extract={extraction} can find in a response"


def last_box(text: str) -> str | None:
    r"""Return the content of the last closed `\boxed{…}`, whose braces match, or None if there is none."""
    for match in reversed(list(_BOX.finditer(text))):
        end = _closing_brace(text, match.end())
        if end is not None:
            return text[match.end() : end]
    return None


def _closing_brace(text: str, start: int) -> int | None:
    depth, position = 1, start
    while position < len(text):
        character = text[position]
        if character == "\\":
            position += 1  # the next character is escaped: \{ and \} are text
        elif character in "{}":
            depth += 1 if character == "{" else -1
            if depth == 0:
                return position
        position += 1
    return None


def _last_answer_tag(text: str) -> str | None:
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    return text[start + len("<answer>") : end] if start >= 0 else None


def _after_hashes(text: str) -> str | None:
    """Return the rest of the line after the last ####, which marks the answer in GSM8K."""
    _, mark, rest = text.rpartition("####")
    return rest.strip().split("\n", 1)[0] if mark else None


def _last_number(text: str) -> str | None:
    return last_numeral(text[-_TAIL_CHARS:])


_MARKS: dict[Extraction, str] = {
    "whole": "ANSWER",
    "boxed": r"\boxed{ANSWER}",
    "answer_tag": "<answer>ANSWER</answer>",
    "hashes": "#### ANSWER",
    "last_number": "ANSWER",
}


_FINDERS = {
    "whole": lambda text: text,
    "boxed": last_box,
    "answer_tag": _last_answer_tag,
    "hashes": _after_hashes,
    "last_number": _last_number,
}
