"""A held-out set may be a share of a source of training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from quatro_ray.config import DataConfig
from quatro_ray.data.dataset import Dataset
from quatro_ray.data.registry import describe, make_dataset
from tests.unit.rewards.test_workers import reward_configs


def load(tmp_path: Path, prompts: list[str], **share: Any) -> Dataset:
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": p, "answer": "1"}) for p in prompts))
    held_out = {"kind": "train_share", "source": "mine", "share": 0.1} | share
    tree = {"train": {"mine": {"kind": "jsonl", "path": str(path)}}, "eval": {"held": held_out}}
    return make_dataset(DataConfig.model_validate(tree), reward_configs(answer={"kind": "exact"}))


PROMPTS = [f"question {n}" for n in range(100)]


def test_every_question_is_in_one_of_the_two(tmp_path: Path) -> None:
    dataset = load(tmp_path, PROMPTS + PROMPTS)
    train, held = ([q.prompt for q in part] for part in (dataset.train["mine"], dataset.held_out["held"]))
    assert (len(train), len(held)) == (180, 10)
    assert not set(train) & set(held) and set(train) | set(held) == set(PROMPTS)
    assert {q.source for q in dataset.held_out["held"]} == {"held"}
    assert describe(dataset) == [
        "data.train.mine: 180 queries; 20 left out: it is held out",
        "data.eval.held: 10 queries",
    ]


def test_the_same_question_with_other_blanks_goes_along(tmp_path: Path) -> None:
    dataset = load(tmp_path, PROMPTS + [f" {prompt}  " for prompt in PROMPTS])
    train, held = ({" ".join(q.prompt.split()) for q in p} for p in (dataset.train["mine"], dataset.held_out["held"]))
    assert (len(train), len(held)) == (90, 10) and not train & held


def test_the_choice_depends_on_the_seed_and_not_on_the_order(tmp_path: Path) -> None:
    def held(prompts: list[str], **share: Any) -> set[str]:
        return {q.prompt for q in load(tmp_path, prompts, **share).held_out["held"]}

    assert held(PROMPTS) == held(PROMPTS[::-1]) != held(PROMPTS, seed=1)


@pytest.mark.parametrize(
    ("share", "expected"),
    [
        ({"source": "other"}, r"eval\.held\.source='other' must be a source of data\.train, one of \['mine'\]"),
        ({"environment": "chess"}, r"eval\.held\.environment='chess' must be that of data\.train\.mine, None; set it"),
    ],
)
def test_a_share_is_of_a_source_that_exists(share: dict[str, Any], expected: str) -> None:
    tree = {
        "train": {"mine": {"kind": "chain_sum"}},
        "eval": {"held": {"kind": "train_share", "source": "mine", "share": 0.1} | share},
    }
    with pytest.raises(ValidationError, match=expected):
        DataConfig.model_validate(tree)
