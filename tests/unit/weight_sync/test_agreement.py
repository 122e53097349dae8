"""Which parameters are compared bit by bit, and which engines differ."""

from __future__ import annotations

import logging

import pytest

from quatro_ray.weight_sync.agreement import WeightComparison

LEARNER = {
    "norm": "bfloat16 4 11",
    "down": "bfloat16 4x8 22",
    "embedding": "bfloat16 100x4 33",
    "square": "bfloat16 4x4 9",
}


def engine(**changes: str) -> list[dict[str, str]]:
    return [{"norm": "bfloat16 4 11", "down": "bfloat16 4x8 22", "qkv": "bfloat16 12x4 44"} | changes]


def test_the_same_bits_are_right_and_others_wrong() -> None:
    comparison = WeightComparison()
    assert comparison.wrong(LEARNER, [engine(), engine()]) == [[], []]
    assert comparison.wrong(LEARNER, [engine(), engine(down="bfloat16 4x8 23")]) == [[], ["down"]]


def test_another_shape_dtype_or_name_is_left_out() -> None:
    comparison = WeightComparison()
    padded = engine(embedding="bfloat16 128x4 55", down="float8_e4m3fn 4x8 66")
    for _ in range(2):
        assert comparison.wrong(LEARNER, [padded]) == [[]]


def test_what_all_engines_store_in_another_way_is_left_out_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    comparison = WeightComparison()
    transposed = engine(square="bfloat16 4x4 10")
    with caplog.at_level(logging.WARNING):
        assert comparison.wrong(LEARNER, [transposed, transposed]) == [[], []]
    assert "engines store square in another way" in caplog.text
    assert comparison.wrong(LEARNER, [engine(square="bfloat16 4x4 12")]) == [[]]


def test_one_engine_that_differs_the_first_time_is_wrong() -> None:
    assert WeightComparison().wrong(LEARNER, [engine(), engine(norm="bfloat16 4 12")]) == [[], ["norm"]]


def test_workers_that_share_a_parameter_need_the_same_bits_and_parts_are_left_out() -> None:
    comparison = WeightComparison()
    two = [{"norm": "bfloat16 4 11", "down": "bfloat16 4x4 70"}, {"norm": "bfloat16 4 11", "down": "bfloat16 4x4 71"}]
    assert comparison.wrong(LEARNER, [two]) == [[]]
    assert comparison.wrong(LEARNER, [[two[0], two[1] | {"norm": "bfloat16 4 12"}]]) == [["norm"]]
