"""Recognises held-out questions, whatever template and system prompt stand around them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from quatro_ray.chats import is_chat, messages_of
from quatro_ray.data.dataset import Rows
from quatro_ray.types import Query


@dataclass(frozen=True)
class Question:
    """The question that a row asks, with white space made single blanks.

    Attributes:
        text: the question itself, without template and system prompt.
        context: values of the row's other columns that the template shows, such as the passage that is asked about.
    """

    text: str
    context: str = ""


def question_of(value: str | list[dict[str, Any]], context: Iterable[object] = ()) -> Question:
    """Return the question in a row.

    Args:
        value: the column of the prompt, as text or as messages; a system message does not count.
        context: values of other columns that the template shows.
    """
    if not isinstance(value, str):
        value = "\n".join(str(message["content"]) for message in value if message["role"] != "system")
    return Question(_plain(value), _plain(" ".join(map(str, context))))


def _plain(text: str) -> str:
    return " ".join(text.split())


class HeldOut:
    """The questions of all held-out sets.

    A training query with the same question is held out, unless both have a context and these differ.
    """

    def __init__(self, sources: Iterable[Rows]) -> None:
        self._contexts: Mapping[str, set[str]] = defaultdict(set)
        for rows in sources:
            for query in rows.queries:
                question = _question(rows, query)
                self._contexts[question.text].add(question.context)

    def has(self, rows: Rows, query: Query) -> bool:
        """Return whether the query of these rows asks a held-out question."""
        question = _question(rows, query)
        contexts = self._contexts.get(question.text)
        if contexts is None:
            return False
        return not question.context or "" in contexts or question.context in contexts


def _question(rows: Rows, query: Query) -> Question:
    """Return the question; a source that keeps none has prompts without a template."""
    if (known := rows.questions.get(query.query_id)) is not None:
        return known
    return question_of(messages_of(query.prompt) if is_chat(query.prompt) else query.prompt)
