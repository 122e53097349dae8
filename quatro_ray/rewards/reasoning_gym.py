"""Scores responses with reasoning-gym's own scorers.

A dataset entry of reasoning-gym is not JSON, so it is generated again from its task, parameters, seed and index.
"""

from __future__ import annotations

import json
import os
from functools import lru_cache
from importlib import import_module
from typing import Any

from quatro_ray.config import ReasoningGymRewardConfig
from quatro_ray.rewards.answer_grammar import EXPRESSION_TASKS, LITERAL_TASKS, evaluates_literals_only, is_expression
from quatro_ray.rewards.base import AnswerUnreadable
from quatro_ray.rewards.extract import answer_of
from quatro_ray.types import Query, Response

METADATA_KEY = "reasoning_gym"
"""Key in Query.metadata; its value is JSON with task, params, seed, size and index."""
SANDBOX_VARIABLE = "QUATRO_RAY_SANDBOX"
"""Environment variable of a worker process inside the sandbox; rewards/workers.py sets it to 1."""
EXECUTING_TASKS = LITERAL_TASKS | EXPRESSION_TASKS
"""Tasks whose scorers evaluate the response. They are scored in the sandbox, as a second line of defence."""


class ReasoningGymReward:
    """The score that the task itself gives to an answer; 1 or 0 if the configuration sets a threshold."""

    def __init__(self, config: ReasoningGymRewardConfig) -> None:
        self._config = config
        import_module(
            "reasoning_gym"
        )  # here: importing takes a second, which must not count against the first response

    def check(self, query: Query) -> str | None:
        """Return why responses to the query cannot be scored, or None if they can."""
        return None if METADATA_KEY in query.metadata else "needs a query that a reasoning_gym source made"

    def __call__(self, query: Query, response: Response) -> float:
        """Return the score of the response's answer.

        Raises:
            AnswerUnreadable: the task's scorer raised on the answer, but scores the expected one.
            RuntimeError: the task's scorer executes responses, and this process is not sandboxed.
        """
        answer = answer_of(response, self._config)
        if answer is None:
            return 0.0
        entry = json.loads(query.metadata[METADATA_KEY])
        if entry["task"] in EXECUTING_TASKS and not in_sandbox():
            raise RuntimeError(f"the scorer of {entry['task']} executes responses, and this process is not sandboxed")
        if entry["task"] in EXPRESSION_TASKS and not is_expression(answer):
            answer = ""  # gets what the scorer gives to a text that it cannot parse
        dataset = _dataset(entry["task"], json.dumps(entry["params"], sort_keys=True), entry["seed"], entry["size"])
        score = _score(dataset, answer, dataset[entry["index"]])
        threshold = self._config.threshold
        return score if threshold is None else float(score >= threshold)


def _score(dataset: Any, answer: str, item: Any) -> float:
    """Return the scorer's value; scorers of reasoning-gym raise on texts that they do not expect."""
    try:
        return float(dataset.score_answer(answer, item))
    except (MemoryError, RecursionError):
        raise
    except Exception:  # whatever the scorer raises; the second call tells whether it is the answer's fault
        return _score_again(dataset, answer, item)


def _score_again(dataset: Any, answer: str, item: Any) -> float:
    try:
        return float(dataset.score_answer(answer, item))
    except (MemoryError, RecursionError):
        raise
    except Exception as error:
        if dataset.score_answer(item["answer"], item) > 0:  # raises if the scorer itself is broken
            raise AnswerUnreadable(f"{type(error).__name__}: {error}"[:200]) from error
        raise


def in_sandbox() -> bool:
    """Return whether this process is a worker inside the sandbox."""
    return os.environ.get(SANDBOX_VARIABLE) == "1"


@lru_cache(maxsize=32)
def _dataset(task: str, params: str, seed: int, size: int) -> Any:
    import reasoning_gym

    dataset = reasoning_gym.create_dataset(task, seed=seed, size=size, **json.loads(params))
    if task in LITERAL_TASKS:
        evaluates_literals_only(dataset)
    return dataset
