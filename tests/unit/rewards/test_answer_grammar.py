"""What reasoning-gym's scorers may evaluate, and responses that tried to write their own verdict."""

import json
from typing import Any

import pytest
import reasoning_gym

from quatro_ray.rewards.answer_grammar import EXPRESSION_TASKS, LITERAL_TASKS, is_expression
from quatro_ray.rewards.reasoning_gym import METADATA_KEY, SANDBOX_VARIABLE
from quatro_ray.types import Query, Response
from tests.unit.rewards.test_rewards import make


def gym(task: str, index: int) -> tuple[Query, Any]:
    entry = reasoning_gym.create_dataset(task, seed=3, size=20)[index]
    where = {"task": task, "params": {}, "seed": 3, "size": 20, "index": index}
    return Query("q", "p", "a", {METADATA_KEY: json.dumps(where)}), entry


@pytest.mark.parametrize(
    "text",
    ["2*x**2 + sin(x)/3 - C", "(1 + 2) * 3", "1.5e3 + .5", "-x^2", "Integral(exp(-x**2), x)", "", " \n", "9" * 100_000],
)
def test_arithmetic_is_an_expression(text: str) -> None:
    assert is_expression(text)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os')", "x.y", "exec(1)", "lambda x: x", "sinx(2)", "x_", "[1]", "'a'", "x = 1", "x; y", "²", "٤",
        "1 if x else 2", "9" * 100_000 + "!", "x " * 50_000 + "é", "getattr(x, y)", "S.x", "x1", "1_0",
    ],
)  # fmt: skip
def test_what_does_more_than_compute_is_none(text: str) -> None:
    assert not is_expression(text)


@pytest.mark.parametrize("task", sorted(LITERAL_TASKS | EXPRESSION_TASKS))
def test_right_answers_are_still_right(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SANDBOX_VARIABLE, "1")
    for index in range(20):
        query, entry = gym(task, index)
        assert make("reasoning_gym")(query, Response(str(entry["answer"]), 1, False)) == 1


def test_lists_are_still_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SANDBOX_VARIABLE, "1")
    query, entry = gym("spiral_matrix", 0)
    assert make("reasoning_gym", threshold=None)(query, Response(str(entry["metadata"]["solution"]), 1, False)) == 0.1


FORGED = [
    "exec('import quatro_ray.rewards.reasoning_gym as r; r._score = lambda *_: 1.0')",
    "setattr(__import__('quatro_ray.rewards.reasoning_gym', fromlist=['x']), '_score', lambda *_: 1.0)",
    "[c for c in ().__class__.__base__.__subclasses__()]",
    "__import__('os').write(1, b'1')",
]


@pytest.mark.parametrize("task", sorted(LITERAL_TASKS | EXPRESSION_TASKS))
def test_a_response_cannot_change_the_scorer(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even in this process, without the sandbox around it."""
    monkeypatch.setenv(SANDBOX_VARIABLE, "1")
    query, _ = gym(task, 0)
    reward = make("reasoning_gym", threshold=None)
    wrong = reward(query, Response("no idea", 1, False))
    for text in FORGED:
        assert reward(query, Response(text, 1, False)) == wrong
        assert reward(query, Response("no idea", 1, False)) == wrong < 1
