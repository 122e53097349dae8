"""Each kind of reward on answers that are right, wrong, odd."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import reasoning_gym
from pydantic import TypeAdapter

from quatro_ray.config import RewardConfig
from quatro_ray.errors import ConfigError
from quatro_ray.rewards.extract import extract, last_box
from quatro_ray.rewards.reasoning_gym import EXECUTING_TASKS, METADATA_KEY, SANDBOX_VARIABLE
from quatro_ray.rewards.registry import make_reward
from quatro_ray.types import Query, Response


def make(kind: str, **settings: Any) -> Any:
    return make_reward(TypeAdapter(RewardConfig).validate_python({"kind": kind, **settings}))


def score(reward: Any, text: str, answer: str = "46", tokens: int = 5) -> float:
    return reward(Query("q", "12+34=", answer), Response(text, tokens, truncated=False))


@pytest.mark.parametrize(
    ("text", "where", "found"),
    [
        (" 46 ", "whole", "46"),
        (r"first \boxed{1}, then \boxed{ \frac{1}{2} }.", "boxed", r"\frac{1}{2}"),
        (r"\boxed {\{1, 2\}} and \boxed{3", "boxed", r"\{1, 2\}"),
        (r"\boxed{", "boxed", None),
        ("no box", "boxed", None),
        ("<answer>1</answer> no, <answer> 2 </answer>", "answer_tag", "2"),
        ("<answer>1", "answer_tag", None),
        ("</answer><answer>", "answer_tag", None),
        ("so\n#### 1,234\nthe end", "hashes", "1,234"),
        ("so 12", "hashes", None),
        ("between 3 and 1,234.5.", "last_number", "1234.5"),
        ("it is -7", "last_number", "-7"),
        ("none", "last_number", None),
    ],
)
def test_extraction(text: str, where: Any, found: str | None) -> None:
    assert extract(text, where) == found


def test_boxes_are_found_in_linear_time() -> None:
    assert last_box(r"\boxed{1}" + r"\boxed{" * 2000) == "1"


@pytest.mark.parametrize(
    ("text", "reward"),
    [("46", 1), (" 46\n", 1), ("+46", 1), ("046", 1), ("46.0", 0), ("The answer is 46", 0), ("4 6", 0), ("", 0),
     ("-46", 0), ("9" * 100_000, 0), ("٤٦", 0)],
)  # fmt: skip
def test_integer(text: str, reward: float) -> None:
    assert score(make("integer"), text) == reward


def test_exact() -> None:
    assert score(make("exact"), "yes\n", " yes ") == 1
    assert score(make("exact"), "Yes", "yes") == 0
    assert score(make("exact", ignore_case=True), "Yes", "yes") == 1
    assert score(make("exact", extract="answer_tag"), "hm <answer>yes</answer>", "yes") == 1
    assert score(make("exact", extract="answer_tag"), "yes", "yes") == 0


def test_regex_and_format() -> None:
    assert score(make("regex", pattern="a.c"), "xxa\ncxx") == 1
    assert score(make("regex", pattern="a.c", match="full"), "xxabcxx") == 0
    shape = make("format")
    assert score(shape, "<think>so</think>\n<answer>46</answer>\n") == 1
    for text in (
        "<answer>46</answer><think>so</think>",
        "<think>so</think><answer>46</answer> and more",
        "hello <think>so</think><answer>46</answer>",
        "<think>a</think><think>b</think><answer>46</answer>",
        "<think>so<answer>46</answer>",
        "",
    ):
        assert score(shape, text) == 0, text


@pytest.mark.parametrize(("tokens", "reward"), [(1, 0), (80, 0), (90, -0.5), (100, -1), (150, -1)])
def test_length(tokens: int, reward: float) -> None:
    assert score(make("length", max_tokens=100, buffer_tokens=20), "", tokens=tokens) == reward


@pytest.mark.parametrize(
    ("gold", "answer", "reward"),
    [
        ("46", "46", 1),
        ("46", "46.", 1),
        ("12", "5+7", 0),
        ("7", "x=8=7", 0),
        ("10000", r"10\,000", 1),
        ("1,000", "1000", 1),
        (r"\frac{1}{2}", "0.5", 1),
        (r"\frac12", "1/2", 1),
        (r"\{1,2\}", r"\{2,1\}", 1),
        ("(1,2)", "(2,1)", 0),
        ("x^2+1", "1+x^2", 1),
        ("x=5", "5", 1),
        (r"\text{east}", "east", 1),
        (r"\sqrt{2}", "1.5", 0),
        ("3", "", 0),
    ],
)
def test_math(gold: str, answer: str, reward: float) -> None:
    part = make("math")
    assert part.check(Query("q", "p", gold)) is None
    assert score(part, rf"I think \boxed{{1}}, no: \boxed{{{answer}}}", gold) == reward


def test_math_looks_nowhere_else_and_reads_no_novels() -> None:
    assert score(make("math"), "the answer is 46") == 0
    assert score(make("math"), r"\boxed{" + "1+" * 1000 + "1}", "x") == 0
    assert score(make("math", extract="whole"), "$46$") == 1
    assert make("math")(Query("q", "p", "1<=x<=2"), Response(r"\boxed{1<=x<=2}", 3, truncated=False)) == 1
    assert "cannot read" in make("math").check(Query("q", "p", "$$"))
    with pytest.raises(ValueError, match="cannot read the answer"):
        score(make("math"), r"\boxed{x}", "$$")


def gym_query(task: str, index: int = 0, **params: Any) -> tuple[Query, dict[str, Any]]:
    where = {"task": task, "params": params, "seed": 3, "size": 5, "index": index}
    entry = reasoning_gym.create_dataset(task, seed=3, size=5, **params)[index]
    return Query("q", entry["question"], str(entry["answer"]), {METADATA_KEY: json.dumps(where)}), entry


@pytest.mark.parametrize("task", ["chain_sum", "leg_counting", "letter_counting", "countdown", "basic_arithmetic"])
def test_reasoning_gym_scores_with_its_own_function(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SANDBOX_VARIABLE, "1")
    query, entry = gym_query(task, 2)
    assert entry["answer"] is not None
    assert make("reasoning_gym")(query, Response(str(entry["answer"]), 1, False)) == 1
    assert make("reasoning_gym")(query, Response("no idea", 1, False)) == 0


def test_scorers_that_execute_text_do_so_in_the_sandbox_only() -> None:
    query, entry = gym_query("countdown", 2)
    with pytest.raises(RuntimeError, match="executes responses, and this process is not sandboxed"):
        make("reasoning_gym")(query, Response(entry["answer"], 1, False))


def test_partial_credit_only_when_asked_for() -> None:
    query, entry = gym_query("chain_sum", 1, min_terms=2)
    almost = Response(f"The answer is {entry['answer']}", 1, False)
    assert make("reasoning_gym")(query, almost) == 0
    assert 0 < make("reasoning_gym", threshold=None)(query, almost) < 1
    assert make("reasoning_gym").check(Query("q", "p", "a")) is not None


def test_the_tasks_that_execute_text_are_tasks() -> None:
    from reasoning_gym.factory import DATASETS

    assert set(DATASETS) >= EXECUTING_TASKS


def test_a_function_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("def starts(query, response):\n    return response.text.startswith(query.answer)\nvalue = 3\n")
    assert score(make("python", function=f"{path}:starts"), "46!") == 1
    with pytest.raises(ConfigError, match="has no function 'other'"):
        make("python", function=f"{path}:other")
    with pytest.raises(ConfigError, match="has no function 'value'"):
        make("python", function=f"{path}:value")
    with pytest.raises(ConfigError, match="No module named 'nowhere'"):
        make("python", function="nowhere:f")
    path.write_text("def f(query, response):\n    return 'good'\n")
    with pytest.raises(TypeError, match="must return a number or None, not 'good'"):
        score(make("python", function=f"{path}:f"), "46")
