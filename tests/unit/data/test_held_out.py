"""Held-out questions are recognised whatever stands around them, and a row's other columns come along."""

from __future__ import annotations

import datetime
import json
import math
from pathlib import Path
from typing import Any

import pytest

from quatro_ray.config import DataConfig
from quatro_ray.data.registry import make_dataset
from quatro_ray.errors import DataError
from tests.unit.data.test_data import jsonl, load

QUESTION = "How many legs have 2 dogs?"


def held_out(tmp_path: Path, *rows: dict[str, Any], **settings: Any) -> dict[str, Any]:
    path = tmp_path / "eval.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return {"held": {"kind": "jsonl", "path": str(path), **settings}}


@pytest.mark.parametrize(
    ("prompt", "train", "settings"),
    [
        (QUESTION, QUESTION, {"system_prompt": "Think."}),
        (QUESTION, QUESTION, {"as_chat": True}),
        (QUESTION, QUESTION, {"prompt_template": "Question: {prompt}\nAnswer:"}),
        (QUESTION, QUESTION, {"prompt_template": "{level}: {prompt}"}),
        (QUESTION, QUESTION + " \n", {}),
        (QUESTION + " ", "How many  legs have 2 dogs?", {}),
        ([{"role": "user", "content": QUESTION}], QUESTION, {}),
        ([{"role": "system", "content": "Think."}, {"role": "user", "content": QUESTION}], QUESTION, {}),
        (QUESTION, [{"role": "user", "content": QUESTION}], {}),
    ],
)
def test_a_held_out_question_is_recognised(
    tmp_path: Path, prompt: object, train: object, settings: dict[str, Any]
) -> None:
    of_eval = held_out(tmp_path, {"prompt": prompt, "answer": "8", "level": 1}, **settings)
    rows = [{"prompt": train, "answer": "8"}, {"prompt": "How many legs have 3 dogs?", "answer": "12"}]
    with pytest.raises(DataError, match="1 prompts are also in data"):
        load(jsonl(tmp_path, *rows), eval=of_eval)
    left = load(jsonl(tmp_path, *rows), eval=of_eval, bad_rows="skip")
    assert [query.answer for query in left.train["mine"]] == ["12"]


def test_the_same_words_about_another_text_are_another_question(tmp_path: Path) -> None:
    template = {"prompt_template": "{text}\n{prompt}"}
    row = {"prompt": "What is the title?", "answer": "a", "text": "one"}
    of_eval = held_out(tmp_path, row, **template)
    assert load(jsonl(tmp_path, row | {"text": "two"}, **template), eval=of_eval).train["mine"]
    with pytest.raises(DataError, match="are also in data"):
        load(jsonl(tmp_path, row, **template), eval=of_eval)


def test_generated_questions_are_recognised_in_another_template() -> None:
    task = {"kind": "reasoning_gym", "task": "leg_counting", "size": 6, "seed": 3}
    config = DataConfig.model_validate(
        {
            "train": {"mine": task | {"size": 8, "as_chat": True, "prompt_template": "Solve: {prompt}"}},
            "eval": {"held": task | {"system_prompt": "Think."}},
        }
    )
    dataset = make_dataset(config, {})
    assert dataset.skipped["train.mine"]["it is held out"] == 6
    assert len(dataset.train["mine"]) == 2


def test_other_columns_are_metadata(tmp_path: Path) -> None:
    row = {"question": "q", "answer": "1", "level": 3, "tags": ["a"], "extra_info": {"index": 7}, "none": None}
    (query,) = load(jsonl(tmp_path, row)).train["mine"]
    assert query.metadata == {"level": 3, "tags": ["a"], "extra_info": {"index": 7}, "none": None}
    verl = {"prompt": "q", "reward_model": {"style": "rule", "ground_truth": "7"}, "data_source": "gsm8k"}
    (query,) = load(jsonl(tmp_path, verl)).train["mine"]
    assert query.metadata == {"reward_model": {"style": "rule", "ground_truth": "7"}, "data_source": "gsm8k"}


def test_values_that_json_has_not_become_text(tmp_path: Path) -> None:
    import datasets

    path = tmp_path / "data.parquet"
    datasets.Dataset.from_list(
        [{"prompt": "q", "answer": "1", "day": datetime.date(2026, 1, 2), "x": math.nan}]
    ).to_parquet(path)
    (query,) = load({"kind": "parquet", "path": str(path)}).train["mine"]
    assert query.metadata == {"day": "2026-01-02", "x": None}
