"""Questions as tensors. Shape letters: Q queries, G rollouts, P prompt tokens, T response tokens."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import reasoning_gym
import torch
from torch import Tensor

from quatro_ray.config import ChainSumSourceConfig
from quatro_ray.data.reasoning_gym import chain_sum

NUM_HELD_OUT = 128
_PALINDROME = 6
"""Letters: three pairs, so that up to six answers are right."""
_EOS = "$"

Rewards = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Task:
    """prompts int64 [n, P]; answers int64 [n, T], filled up with eos."""

    prompts: Tensor
    answers: Tensor
    held_out_prompts: Tensor
    held_out_answers: Tensor
    vocabulary: int
    eos: int
    rewards: Rewards
    """responses [Q, G, T], answers [Q, T] → float64 [Q, G]; exactly what the library's scorer gives 1."""

    @property
    def max_response_tokens(self) -> int:
        return self.answers.shape[1]


def is_answer(responses: Tensor, answers: Tensor) -> Tensor:
    """1 where a response is the answer, to its end."""
    return (responses == answers[:, None]).all(-1).double()


def is_palindrome_of_letters(responses: Tensor, answers: Tensor) -> Tensor:
    """1 where a response has the letters of the answer, all of them, and reads the same from both ends."""
    letters, wanted = responses[..., :_PALINDROME], answers[:, None, :_PALINDROME]
    same_letters = (letters.sort(-1).values == wanted.sort(-1).values).all(-1)
    ends = (responses[..., _PALINDROME:] == answers[:, None, _PALINDROME:]).all(-1)
    return (same_letters & ends & (letters == letters.flip(-1)).all(-1)).double()


@cache
def make_task(name: str) -> Task:
    """`addition`: two terms of two digits. `palindrome`: a palindrome from given letters. Both of reasoning-gym."""
    pairs, scorer = {"addition": (_addition, is_answer), "palindrome": (_palindrome, is_palindrome_of_letters)}[name]
    rows = pairs()
    random.Random(0).shuffle(rows)
    symbols = sorted({character for row in rows for character in "".join(row)} | {_EOS})
    index = {symbol: i for i, symbol in enumerate(symbols)}
    answer_length = max(len(answer) for _, answer in rows) + 1

    def encode(texts: list[str]) -> Tensor:
        return torch.tensor([[index[character] for character in text] for text in texts])

    prompts = encode([prompt for prompt, _ in rows])
    answers = encode([answer.ljust(answer_length, _EOS) for _, answer in rows])
    n = NUM_HELD_OUT
    return Task(prompts[n:], answers[n:], prompts[:n], answers[:n], len(symbols), index[_EOS], scorer)


def _addition() -> list[tuple[str, str]]:
    config = ChainSumSourceConfig(kind="chain_sum", min_digits=2, max_digits=2, num_questions=6000)
    rows = [(q.prompt, q.answer) for q in chain_sum(config, "addition").queries]
    random.Random(0).shuffle(rows)
    return rows[NUM_HELD_OUT:] + rows[:NUM_HELD_OUT]  # the order in which the committed figures were made


def _palindrome() -> list[tuple[str, str]]:
    items = reasoning_gym.create_dataset(
        "palindrome_generation", size=6000, seed=0, min_length=_PALINDROME, max_length=_PALINDROME
    )
    found = {"".join(item["metadata"]["letters"]) + "=": item["metadata"]["generated_palindrome"] for item in items}
    return sorted(found.items())
