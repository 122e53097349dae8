"""Golden answers: what is accepted can be paid, and plain ways to write a number are one number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from quatro_ray.config import DataConfig
from quatro_ray.data.registry import make_dataset
from quatro_ray.errors import DataError
from quatro_ray.rewards.extract import extract
from quatro_ray.rewards.numerals import integer_of, number_of
from quatro_ray.types import Query, Response
from tests.unit.rewards.test_rewards import make, score
from tests.unit.rewards.test_workers import reward_configs


def load(tmp_path: Path, reward: dict[str, Any], answer: object, **source: Any) -> Query:
    """The query that a row with this answer becomes."""
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps({"prompt": "how many?", "answer": answer}))
    held_out = {"kind": "chain_sum", "num_questions": 8}
    data = DataConfig.model_validate(
        {"train": {"mine": {"kind": "jsonl", "path": str(path), **source}}, "eval": {"held": held_out}}
    )
    return make_dataset(data, reward_configs(answer={"only": ["mine"], **reward})).train["mine"][0]


@pytest.mark.parametrize(
    ("answer", "right", "wrong"),
    [
        (["1", "2"], ["1,2", "2, 1", r"\{1,2\}", r"\{2, 1\}"], ["1", "1,3", "[1,2]"]),
        ([1, 2], ["1,2", "2, 1"], ["12"]),
        (["1e-5", "2"], ["2, 0.00001"], ["2, 1"]),
        ("[1,2]", ["[1,2]"], ["(1,2)"]),
        (1e-05, ["0.00001", "10^{-5}", r"1 \times 10^{-5}", "1e-5", r"\frac{1}{100000}"], ["-2.28171817", "0.00002"]),
        ("1e-05", ["0.00001", "10^{-5}"], ["-2.28171817"]),
        ("7.353e14", [r"7.353 \times 10^{14}", "735300000000000", r"7.353\cdot10^{14}"], ["7.353"]),
        (1e-7, ["0.0000001"], ["0.0000002", "0"]),
        ("1,234", ["1234", "1,234", "1{,}234", "1234.0"], ["234", "1234.001"]),
        ("$5", ["5", r"\$5", "$5$"], ["6"]),
        (0.3333333333, [r"\frac{1}{3}", "0.333333"], ["0.33"]),
    ],
)
def test_plain_renderings_of_a_math_answer_are_paid(
    tmp_path: Path, answer: object, right: list[str], wrong: list[str]
) -> None:
    query, reward = load(tmp_path, {"kind": "math"}, answer), make("math")
    paid = {text: reward(query, Response(rf"\boxed{{{text}}}", 3, False)) for text in [*right, *wrong]}
    assert paid == dict.fromkeys(right, 1.0) | dict.fromkeys(wrong, 0.0)


@pytest.mark.parametrize(
    ("reward", "answer", "source", "expected"),
    [
        ({"kind": "math"}, {"value": "3"}, {}, "needs an answer, not an object"),
        ({"kind": "math"}, [{"value": "3"}], {}, "needs an answer, not an object"),
        ({"kind": "exact"}, "   ", {}, "the answer is missing"),
        ({"kind": "exact"}, r"so \boxed{}", {"answer_extract": "boxed"}, "the answer is missing"),
        ({"kind": "exact", "extract": "boxed"}, r"\boxed{5}", {}, "extract=boxed"),
        ({"kind": "exact", "extract": "last_number"}, "many", {}, "extract=last_number"),
        ({"kind": "exact", "extract": "hashes"}, "two\nlines", {}, "extract=hashes"),
        ({"kind": "exact", "extract": "answer_tag"}, "a<answer>b", {}, "extract=answer_tag"),
        ({"kind": "integer"}, "5.5", {}, "needs an integer answer"),
        ({"kind": "integer"}, "21,25", {}, "needs an integer answer"),
    ],
)
def test_an_answer_that_could_never_be_paid_is_refused(
    tmp_path: Path, reward: dict[str, Any], answer: object, source: dict[str, Any], expected: str
) -> None:
    with pytest.raises(DataError, match=expected) as caught:
        load(tmp_path, reward, answer, **source)
    assert f"{tmp_path}/train.jsonl:1: " in str(caught.value)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (".5", "0.5"), ("3/4", "3/4"), ("1.5e-6", "1.5e-6"), ("-.5", "-0.5"), ("it is −7.", "-7"), ("-$1,234", "-1234"),
        ("$5 each", "5"), ("5kg", "5"), ("5%", "5"), ("the 46th", "46"), ("12+34=46", "46"), (r"\boxed{46}", "46"),
        ("Answer:-7", "-7"), ("1.2.3", None), ("10:30", None), ("2024-01-05", None), ("10^{-5}", None), ("x2", None),
        ("2 1/2", None), (r"\frac{3}{4}", None), (r"\sqrt{2}", None), ("x_{12}", None), ("12,34", None), ("5+7", None),
        ("3, then x2", None),
    ],
)  # fmt: skip
def test_the_last_number_is_whole_or_nothing(text: str, found: str | None) -> None:
    assert extract(text, "last_number") == found


def test_last_number_of_a_long_text_takes_linear_time() -> None:
    assert extract("1" * 200_000, "last_number") is not None
    assert extract("\\frac{" * 100_000 + "1", "last_number") is None


@pytest.mark.parametrize(
    ("text", "number"),
    [("2,125", 2125), ("$5", 5), (r"\$5", 5), ("-$5", -5), ("$ 1,000.", 1000), ("5.", 5), ("+07", 7), ("5.5", None),
     ("1,23", None), ("", None), ("$", None), ("$$", None), ("٤٦", None), ("5 7", None), ("5+7", None)],
)  # fmt: skip
def test_integers_as_gsm8k_writes_them(text: str, number: int | None) -> None:
    assert integer_of(text) == number


def test_gsm8k(tmp_path: Path) -> None:
    integer = {"kind": "integer", "extract": "hashes"}
    reward = make(**integer)
    for source in ({"answer_extract": "hashes"}, {}):
        query = load(tmp_path, integer, "It is 2,000 + 125.\n#### 2,125", **source)
        paid = [reward(query, Response(text, 1, False)) for text in ("#### 2125", "#### $2,125", "#### 2126")]
        assert paid == [1, 1, 0]
    query = load(tmp_path, {"kind": "integer"}, "$5")
    assert make("integer")(query, Response("5", 1, False)) == 1


@pytest.mark.parametrize("text", ["1e999999999", "10^{9999}", "9" * 100_000, "1/0", r"\frac{1}{0}", "(" * 10_000])
def test_numbers_that_are_none_or_too_large(text: str) -> None:
    assert number_of(text) is None


def test_a_response_that_never_stops_thinking_has_no_answer() -> None:
    for text in (r"<think>maybe \boxed{46}", r"<think>a</think> \boxed{1} <think> \boxed{46}"):
        assert score(make("math"), text) == 0
        assert score(make("math", unclosed_think="search"), text) == 1
    assert score(make("math"), r"<think>maybe \boxed{1}</think> \boxed{46}") == 1
    opened = Response(r"maybe \boxed{46}", 3, truncated=True, prompt_tail="<assistant>\n<think>\n")
    assert make("math")(Query("q", "p", "46"), opened) == 0


def test_the_format_begins_where_the_chat_template_opened_it() -> None:
    def paid(tail: str, text: str) -> float:
        return float(make("format")(Query("q", "p", "a"), Response(text, 3, False, prompt_tail=tail)))

    good = "so</think>\n<answer>46</answer>"
    assert paid("<|im_start|>assistant\n<think>\n", good) == 1
    assert paid("<|im_start|>assistant\n", good) == 0
    assert paid("<|im_start|>assistant\n<think>\n", "<think>" + good) == 0
    assert paid("<|im_start|>assistant\n<think>\n\n</think>\n\n", "<answer>46</answer>") == 1
    assert paid("<|im_start|>assistant\n", "<think>" + good) == 1
