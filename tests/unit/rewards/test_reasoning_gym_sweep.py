"""Every task of reasoning-gym: whatever the model wrote is scored, and what no scorer can read is told apart."""

from __future__ import annotations

import pytest
import reasoning_gym
from reasoning_gym.factory import DATASETS

from quatro_ray.rewards.base import AnswerUnreadable
from quatro_ray.rewards.reasoning_gym import SANDBOX_VARIABLE
from quatro_ray.types import Response
from tests.unit.rewards.test_rewards import gym_query, make

_ODD = ["2 * 3", "2, 3", "words", "", "[", "{}", "1", "None", "1/0"]
_BROKEN = {"boxnet"}
"""Tasks whose scorer gives their own expected answer 0."""


@pytest.mark.parametrize("task", sorted(DATASETS.keys() - {"composite"}))
def test_odd_answers_are_scored_or_unreadable(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SANDBOX_VARIABLE, "1")  # these few texts are harmless
    query, _ = gym_query(task)
    for text in _ODD:
        try:
            assert 0 <= make("reasoning_gym")(query, Response(text, 1, False)) <= 1
        except AnswerUnreadable:
            continue
        except Exception:
            assert task in _BROKEN, text


def test_prime_factors_in_words_are_unreadable() -> None:
    query, entry = gym_query("prime_factorization")
    for text in ("2 * 3", "2, 3", "words"):
        with pytest.raises(AnswerUnreadable, match="ValueError"):
            make("reasoning_gym")(query, Response(text, 1, False))
    assert make("reasoning_gym")(query, Response(entry["answer"], 1, False)) == 1


def test_a_scorer_that_cannot_score_its_own_answer_is_at_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    query, _ = gym_query("prime_factorization")
    dataset = type(reasoning_gym.create_dataset("prime_factorization", seed=3, size=5))
    monkeypatch.setattr(dataset, "score_answer", lambda self, answer, entry: int("broken"))
    with pytest.raises(ValueError, match="broken"):
        make("reasoning_gym")(query, Response("2 * 3", 1, False))
